"""Compiled GELU and GLU: PyTorch's, with the bias of the Linear layer before, whatever the size; and when they run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trained_like import relative

from sashimi.layers import FeedForward, S4Block
from sashimi.native.pointwise import gelu, glu, serves
from sashimi.s4 import S4

CALLS: dict[str, tuple[Callable, Callable]] = {"gelu": (gelu, F.gelu), "glu": (glu, lambda x: F.glu(x, dim=-1))}


def numbers(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(shape)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(2, 400, 64), (1000, 40), (9001, 6), (16400, 2), (1, 1 << 15)])
def test_it_is_pytorchs(shape: tuple[int, ...], name: str) -> None:
    """Of rows that fill no vector, and that are no whole number of those whose sums are taken together.

    In float32 it is as near to float64 as PyTorch is, with and without a bias, back and forth. Mutations, in
    pointwise.cpp: in `load`, `(n - i)` -> `(n - i - 1)`; in `for_rows`, no `fill_n`; in `gelu_rows_back`, no `+ load…`;
    in `glu_rows_back`, `(1 - gate)` left out.
    """
    compiled, reference = CALLS[name]
    x, bias = numbers(*shape).requires_grad_(), numbers(shape[-1]).requires_grad_()
    assert serves(x)
    for given in (bias, None):
        inputs = [x] if given is None else [x, bias]
        y = compiled(x, given)
        weights = torch.linspace(1, 2, y.numel()).view_as(y)
        actual = [y, *torch.autograd.grad(y, inputs, weights)]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = reference(wide[0] if given is None else wide[0] + wide[1])
        expected = [exact, *torch.autograd.grad(exact, wide, weights.double())]
        for one, other in zip(actual, expected, strict=True):
            assert relative(one, other) < 1e-6


@pytest.mark.parametrize("name", CALLS)
def test_it_takes_what_is_not_contiguous(name: str) -> None:
    """A transpose, and its gradient. Mutation: in `_backward`, no `d_y.contiguous()`."""
    compiled, reference = CALLS[name]
    x = numbers(200, 300).mT.requires_grad_()
    weights = numbers(x.shape[1] // (2 if name == "glu" else 1), 300).mT
    results = []
    for function in (compiled, reference):
        y = function(x)
        results.append((y, *torch.autograd.grad(y, x, weights)))
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_finite_stays_so(name: str) -> None:
    """So that a run that diverges is seen to. Mutation: in `clamp`, `x < a ? a : x` -> `x > a ? x : a`."""
    compiled, reference = CALLS[name]
    x = torch.zeros(1 << 15)
    x[:3] = torch.tensor([torch.nan, torch.inf, 1e38])
    x[-3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert torch.equal(torch.isfinite(compiled(x[None])), torch.isfinite(reference(x[None])))


def few(x: Tensor) -> Tensor:
    return x[:100]


def elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


@pytest.mark.parametrize(
    ("change", "autocast"),
    [(Tensor.double, False), (Tensor.bfloat16, False), (few, False), (elsewhere, False), (torch.clone, True)],
)
def test_all_else_is_left_to_torch(change: Callable[[Tensor], Tensor], autocast: bool) -> None:
    """Other precisions and devices, autocast, and what is short. Mutations: any condition of `serves` left out."""
    x = numbers(1600, 64)
    assert serves(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not serves(change(x))
        bias = change(x)[0]
        assert gelu(change(x), bias).dtype == change(x).dtype
        assert glu(change(x), bias).shape[-1] == 32


def test_torch_compile_makes_its_own() -> None:
    """As one graph, of its own functions. Mutation: no `is_compiling`."""
    x = numbers(1600, 64)
    seen = []

    def watch(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(gelu, backend=watch, fullgraph=True)
    assert relative(compiled(x), gelu(x)) < 1e-6
    assert any("gelu" in target for target in seen), seen


def test_it_may_be_traced() -> None:
    """By tensors that have no numbers. Mutation: no `@_forward.register_fake`."""
    with FakeTensorMode():
        x = torch.zeros(2000, 64, requires_grad=True)
        y = glu(gelu(x, x[0]), None)
        y.sum().backward()
    assert y.shape == (2000, 32)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("rows", [4, 1600])
def test_layers_are_the_same(rows: int) -> None:
    """With few rows and many, outputs and gradients, those of the biases among them; and hooks of the layers run.

    Mutations: in `Linear.forward`, `then(self._affine(x, self.bias), self.bias)`, or `None` for the first one's bias.
    """
    torch.manual_seed(0)
    x = numbers(1, rows, 64).requires_grad_()
    ff, block = FeedForward(64, 2), S4Block(S4(64, 4), 64, glu=True)
    assert serves(x) == (rows == 1600)
    called = []
    for layer in (ff.expand, block.output):
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    for layer, expected in (
        (lambda x: ff(x)[0], ff.contract(F.gelu(ff.expand(x)))),
        (block.mix, F.glu(block.output(F.gelu(x)), dim=-1)),
    ):
        y = layer(x)
        parameters = [x, *(ff if layer != block.mix else block.output).parameters()]
        actual = [y, *torch.autograd.grad(y.sum(), parameters)]
        for one, other in zip(actual, [expected, *torch.autograd.grad(expected.sum(), parameters)], strict=True):
            assert relative(one, other) < 1e-5
    assert called == [ff.expand, block.output] * 2


@pytest.mark.usefixtures("nothing_loaded")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch does it, which is said once. Mutation: in `library_or_none`, no `functools.cache`, or no warning."""
    x = numbers(1600, 64)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="GELU and GLU run in PyTorch.*there is no C\\+\\+ compiler") as said:
        outputs = [gelu(x) for _ in range(2)]
    assert len(said) == 1
    assert all(torch.equal(y, F.gelu(x)) for y in outputs)
