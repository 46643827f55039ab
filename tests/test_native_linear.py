"""Compiled Linear layers with their activations: PyTorch's, whatever the size; and when they run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trained_like import relative

from sashimi.layers import FeedForward, S4Block
from sashimi.linear import Linear
from sashimi.model import ModelConfig, Sashimi
from sashimi.native.linear import linear, serves
from sashimi.s4 import S4

ACTIVATIONS = [(False, False), (True, False), (False, True), (True, True)]


def numbers(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(shape)


def reference(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, glu: bool) -> Tensor:
    y = F.linear(F.gelu(x) if gelu else x, weight, bias)
    return F.glu(y, dim=-1) if glu else y


def with_gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.linspace(1, 2, y.numel()).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, weights)]


@pytest.mark.parametrize(("gelu", "glu"), ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((2, 400, 64), 128), ((1025, 32), 96), ((17009, 16), 32), ((97, 352), 64), ((1, 1 << 15), 32)],
)
def test_it_is_pytorchs(shape: tuple[int, ...], outputs: int, gelu: bool, glu: bool) -> None:
    """Of rows that are no whole number of blocks, or of those whose sums are taken together, and of broken panels.

    Outputs and gradients, of which none is further from float64's than 1e-5. Mutations, in linear.cpp: in `by_panels`,
    `plus + j` -> `plus`; in `forward`, `first * N / 2` -> `first * N`; in `backward`, no `fill_n`, `first + part` ->
    `first + part + 1`, no sum of `bias_sum`, no `*=`, or `p < parts` -> `p < 1`; in `output_gradient`, no `(1 - gate)`;
    in activations.h, `0.39894228f` -> `0.4f`.
    """
    layer, x = Linear(shape[-1], outputs), numbers(*shape).requires_grad_()
    inputs = [x, layer.weight, layer.bias]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(reference(*wide, gelu, glu), *wide)
    for one, other in zip(with_gradients(linear(*inputs, gelu, glu), *inputs), exact, strict=True):
        assert relative(one, other) < 1e-5


def test_activations_are_as_near_as_pytorchs() -> None:
    """GELU, its slope, and the gate, where they are not constant: to 3e-7 of x and of 1, 2e-6 of the gate.

    Mutations: in activations.py, `5.75` -> `4`; in activations.h, `5.75` -> `5`.
    """
    x = torch.linspace(-30, 30, 1 << 17).view(-1, 16).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, exact = linear(x, torch.eye(16), torch.zeros(16), True, False), F.gelu(wide)
    assert ((y - exact) / wide).abs().max() < 3e-7
    slope, exact_slope = (torch.autograd.grad(t.sum(), of)[0] for t, of in ((y, x), (exact, wide)))
    assert (slope - exact_slope).abs().max() < 3e-7
    halves = torch.cat((torch.ones_like(x), x), dim=-1)
    gate = linear(halves, torch.eye(32), torch.zeros(32), False, True)
    assert (gate / torch.sigmoid(wide) - 1).abs().max() < 2e-6


def test_gelu_of_what_is_far_below_is_nothing() -> None:
    """And its slope. Mutations: in `gelu_and_slope`, no `x < -END`, no `c != x`."""
    x = torch.full((1, 16), -1e4).requires_grad_()
    y = linear(x, torch.eye(16), torch.zeros(16), True, False)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert not slope.any()


@pytest.mark.parametrize(("gelu", "glu"), ACTIVATIONS)
def test_tensors_may_lie_anywhere(gelu: bool, glu: bool) -> None:
    """Transposed, or cut out of the middle of others, as flattened parameters are, and so gradients.

    Mutations: in `aligned`, no `contiguous`, or `% 1`; in `_forward`, `torch.empty_like(weight)`.
    """
    x, flat = numbers(96, 500).mT.requires_grad_(), numbers(1 + 64 * 96 + 64)
    bias, gradient = flat[-64:].requires_grad_(), numbers(32 if glu else 64, 501).mT[1:]
    for weight in (flat[1:-64].view(64, 96), flat[1:-64].view(96, 64).mT):
        assert weight.data_ptr() % 64 != 0
        inputs, results = [x, weight.requires_grad_(), bias], []
        for y in (linear(*inputs, gelu, glu), reference(*inputs, gelu, glu)):
            results.append([y, *torch.autograd.grad(y, inputs, gradient)])
        for one, other in zip(*results, strict=True):
            assert relative(one, other) < 1e-5


def test_threads_change_no_bit() -> None:
    """Mutation: in `_backward`, `_MOST_PARTS` -> `torch.get_num_threads()`."""
    layer, x = Linear(32, 64), numbers(20000, 32).requires_grad_()
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(with_gradients(layer(x, gelu=True, glu=True), x, layer.weight, layer.bias))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("gelu", "glu"), ACTIVATIONS)
def test_what_is_not_finite_stays_so(gelu: bool, glu: bool) -> None:
    """So that a run that diverges is seen to. Mutation: in `gelu_and_slope`, `{x * normal` -> `{c * normal`."""
    layer, x = Linear(16, 32), torch.zeros(1 << 11, 16)
    x[0, 0], x[-1, -1], x[7, 7] = torch.nan, torch.inf, -1e38
    finite = torch.isfinite(linear(x, layer.weight, layer.bias, gelu, glu)).all(dim=-1)
    assert torch.equal(finite, torch.isfinite(reference(x, layer.weight, layer.bias, gelu, glu)).all(dim=-1))


def few_rows(x: Tensor) -> Tensor:
    return x[:250].repeat(1, 8)


def few_numbers(x: Tensor) -> Tensor:
    return x[:1000, :32]


def uneven(x: Tensor) -> Tensor:
    return x[:, :56]


def elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


@pytest.mark.parametrize(
    ("change", "autocast", "outputs", "glu"),
    [
        (Tensor.double, False, 64, False),
        (Tensor.bfloat16, False, 64, False),
        (few_rows, False, 64, False),
        (few_numbers, False, 64, False),
        (elsewhere, False, 64, False),
        (torch.clone, True, 64, False),
        (uneven, False, 64, False),
        (torch.clone, False, 56, False),
        (torch.clone, False, 48, True),
        (torch.clone, False, (1 << 14) + 32, False),
    ],
)
def test_all_else_is_left_to_torch(change: Callable[[Tensor], Tensor], autocast: bool, outputs: int, glu: bool) -> None:
    """Other precisions and devices, autocast, what is little, channels that fill no vectors, and large layers.

    Mutations: any condition of `serves` left out.
    """
    x = numbers(1600, 64)
    assert serves(x, x[:64], glu=False)
    assert serves(x, x[:64], glu=True)
    assert not serves(x, x[:64].double(), glu=True)
    x = change(x)
    layer = Linear(x.shape[-1], outputs).to(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not serves(x, layer.weight, glu)
        y, expected = layer(x, True, glu), reference(x, layer.weight, layer.bias, True, glu)
    assert y.dtype == expected.dtype
    assert x.is_meta or torch.equal(y, expected)


def test_torch_compile_makes_its_own() -> None:
    """As one graph, of its own functions. Mutation: no `is_compiling`."""
    layer, x = Linear(64, 64), numbers(1600, 64)
    seen = []

    def watch(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(layer, backend=watch, fullgraph=True)
    assert relative(compiled(x, True), layer(x, True)) < 1e-5
    assert any("gelu" in target for target in seen), seen


def test_it_may_be_traced() -> None:
    """By tensors that have no numbers. Mutation: no `@_backward.register_fake`."""
    with FakeTensorMode():
        layer, x = Linear(64, 96), torch.zeros(2000, 64, requires_grad=True)
        y = layer(x, gelu=True, glu=True)
        y.sum().backward()
    assert y.shape == (2000, 48)
    for t in (x, layer.weight, layer.bias):
        assert t.grad is not None
        assert t.grad.shape == t.shape


@pytest.mark.parametrize("rows", [4, 1600])
def test_layers_are_the_same(rows: int) -> None:
    """With few rows and many, outputs and gradients; and hooks of the Linear layers run.

    Mutations: in layers.py, no `gelu=True` in either place; in `Linear.forward`, no `F.gelu`.
    """
    torch.manual_seed(0)
    x = numbers(1, rows, 64).requires_grad_()
    ff, block = FeedForward(64, 2), S4Block(S4(64, 4), 64, glu=True)
    assert serves(x, block.output.weight, glu=True) == (rows == 1600)
    called = []
    for layer in (ff.expand, ff.contract, block.output):
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    first, second, last = ((layer.weight, layer.bias) for layer in (ff.expand, ff.contract, block.output))
    hidden = reference(x, *first, False, False)
    for y, expected, parameters in (
        (ff(x)[0], reference(hidden, *second, True, False), [*first, *second]),
        (block.mix(x), reference(x, *last, True, True), last),
    ):
        gradients = zip(with_gradients(y, x, *parameters), with_gradients(expected, x, *parameters), strict=True)
        assert all(relative(one, other) < 1e-5 for one, other in gradients)
    assert called == [ff.expand, ff.contract, block.output]


@pytest.mark.parametrize("recompute", [False, True])
def test_models_train_by_it(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a model, its layers recomputed or not, are those without it; weights are read once.

    Mutations: in `Linear.forward`, `self.weight` in both places; in `_backward`, `d_x` filled with zeros.
    """
    torch.manual_seed(0)
    config = ModelConfig(levels=32, d_model=32, n_layers=1, d_state=4, pool=(4,), weight_norm=True)
    model, ids = Sashimi(config), torch.randint(32, (2, 4096))
    if recompute:
        model.recompute_layers()
    results, served, read = [], [], []
    pooling = model.tier.pooled
    assert pooling is not None
    pooling.down.linear.parametrizations.weight[0].register_forward_hook(lambda *_: read.append(1))
    for compiled in (True, False):

        def watched(x: Tensor, weight: Tensor, glu: bool, compiled: bool = compiled) -> bool:
            served.append(compiled and serves(x, weight, glu))
            return served[-1]

        monkeypatch.setattr("sashimi.linear.serves", watched)
        loss = model(ids).logsumexp(-1).square().mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        assert served.count(True) == (0 if not compiled else 15 if recompute else 9)
        served.clear()
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-4
    assert len(read) == 2


@pytest.mark.usefixtures("nothing_loaded")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch does it, which is said once. Mutation: in `library_or_none`, no warning."""
    layer, x = Linear(64, 64), numbers(1600, 64)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="Linear layers run in PyTorch.*there is no C\\+\\+ compiler") as said:
        outputs = [layer(x, gelu=True) for _ in range(2)]
    assert len(said) == 1
    assert all(torch.equal(y, reference(x, layer.weight, layer.bias, True, False)) for y in outputs)
