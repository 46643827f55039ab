"""Linear layers by either library: the same layer, and the right one of the two."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trained_like import relative

from sashimi import linear
from sashimi.linear import Linear, is_amd


@pytest.fixture(autouse=True)
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever computer this is."""
    monkeypatch.setattr(linear, "is_amd", lambda: True)


class Convolutions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(2, 1600, 8), (1024, 8), (3, 16, 64, 8)])
def test_both_are_the_same_layer(shape: tuple[int, ...]) -> None:
    """Outputs and gradients, of any form of input, contiguous or not.

    Mutations: no `permute(0, 2, 3, 1)`; no bias.
    """
    torch.manual_seed(0)
    layer = Linear(8, 24)
    for x in (torch.randn(shape), torch.randn(*shape[:-2], shape[-1], shape[-2]).mT):
        x = x.requires_grad_()
        gradient = torch.randn(*shape[:-1], 24)
        with Convolutions() as made:
            y = layer(x)
        assert made.count == 1
        results = [(y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), gradient))]
        y = torch.nn.functional.linear(x, layer.weight, layer.bias)
        results.append((y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), gradient)))
        for actual, expected in zip(*results, strict=True):
            assert actual.shape == expected.shape
            assert relative(actual, expected) < 1e-5


def short(x: Tensor) -> Tensor:
    return x[:, :96]


def uneven(x: Tensor) -> Tensor:
    return x[:, :1599]


def elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


@pytest.mark.parametrize(
    ("change", "autocast"),
    [
        (torch.Tensor.double, False),
        (torch.Tensor.bfloat16, False),
        (short, False),
        (uneven, False),
        (torch.clone, True),
        (elsewhere, False),
    ],
)
def test_all_else_is_left_to_torch(change: Callable[[Tensor], Tensor], autocast: bool) -> None:
    """Other precisions and devices, autocast, what is short, and what does not make whole images.

    Mutations: any of the conditions of `_affine` left out.
    """
    x = change(torch.randn(1, 1600, 8))
    layer = Linear(8, 24).to(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Convolutions() as made:
        layer(x)
    assert made.count == 0


def test_other_cpus_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: no `is_amd()` in `_affine`."""
    monkeypatch.setattr(linear, "is_amd", lambda: False)
    with Convolutions() as made:
        Linear(8, 24)(torch.randn(1, 1600, 8))
    assert made.count == 0


def test_it_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """For torch.compile, on this computer. Mutation: no `assume_constant_result`."""
    monkeypatch.setattr(linear, "is_amd", is_amd)
    layer, x = Linear(8, 24), torch.randn(1, 1600, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x), layer(x)) < 1e-5
