"""What surrounds the state space, layer by layer: its formula, and forward = step (law 2)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained_like import relative, trained_like

from sashimi.layers import DownPool, FeedForward, Residual, S4Block, ScalarNorm, UpPool
from sashimi.s4 import S4

H, EXPAND, POOL = 6, 2, 4


def signal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- norm --------------------------------------------------------------------------------------------------


def test_scalar_norm_is_the_originals() -> None:
    """y = (s/σ)(x − μ + m), biased σ, no epsilon. Mutations: `correction=0` -> `1`; `+ self.m` outside the bracket."""
    norm = trained_like(ScalarNorm().double())
    x = 3 + 0.01 * signal(2, 5, H)
    mean = x.mean(-1, keepdim=True)
    sigma = (x - mean).square().mean(-1, keepdim=True).sqrt()
    assert relative(norm(x), norm.s / sigma * (x - mean + norm.m)) < 1e-13


@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_scalar_norm_counts_in_float32(way: str) -> None:
    """Statistics are float32 for bfloat16 input, under autocast and in a cast module: 3 + noise keeps its noise.

    Mutation: `x.to(torch.promote_types(self.s.dtype, torch.float32))` -> `x.to(self.s.dtype)`.
    """
    x = (3 + 0.1 * signal(2, 5, 512)).bfloat16()
    expected = ScalarNorm()(x.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        y = (ScalarNorm().bfloat16() if way == "cast" else ScalarNorm())(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, expected) < 2**-8  # one rounding of the result


# --- blocks ------------------------------------------------------------------------------------------------


def s4_block(glu: bool) -> S4Block:
    torch.manual_seed(0)
    return trained_like(S4Block(S4(H, 8), H, glu).double())


@pytest.mark.parametrize("glu", [True, False])
def test_s4_block_formula(glu: bool) -> None:
    """S4 → GELU → Linear (→ GLU). Mutations: in mix, drop F.gelu; swap the GLU's halves."""
    block, u = s4_block(glu), signal(2, 50, H)
    y = F.gelu(block.s4(u)[0]) @ block.output.weight.T + block.output.bias
    expected = y[..., :H] * torch.sigmoid(y[..., H:]) if glu else y
    assert relative(block(u)[0], expected) < 1e-13


def test_feed_forward_formula() -> None:
    """Linear (×ff) → GELU → Linear. Mutation: drop F.gelu."""
    layer = trained_like(FeedForward(H, 3).double())
    x = signal(2, 5, H)
    hidden = x @ layer.expand.weight.T + layer.expand.bias
    assert hidden.shape == (2, 5, 3 * H)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    assert relative(layer(x)[0], hidden @ layer.contract.weight.T + layer.contract.bias) < 1e-13


@pytest.mark.parametrize("norm", ["layer", "scalar"])
@pytest.mark.parametrize("kind", ["glu", "no glu", "feed-forward"])
def test_residual_forward_equals_step(kind: str, norm: str) -> None:
    """Law 2 of each residual layer, from a fresh state and from one carried over.

    Mutation: in Residual.step, `self.layer.step(self.norm(x), state)` -> `self.layer.step(x, state)`.
    """
    layer = FeedForward(H, 2).double() if kind == "feed-forward" else s4_block(kind == "glu")
    residual = Residual(nn.LayerNorm(H) if norm == "layer" else ScalarNorm(), layer, 0.0).double()
    trained_like(residual)
    x = signal(2, 100, H)
    with torch.no_grad():
        whole, _ = residual(x)
        state = residual.init_state(2)
        first, state = residual(x[:, :70], state)
        outputs = [first]
        for sample in x[:, 70:].unbind(1):
            y, state = residual.step(sample, state)
            outputs.append(y.unsqueeze(1))
    assert relative(torch.cat(outputs, dim=1), whole) < 1e-9
    assert relative(whole - x, layer(residual.norm(x))[0]) < 1e-13


def test_dropout_is_on_the_branch_in_training_alone() -> None:
    """Dropout zeroes and rescales the branch, never the skip; none in eval. Mutation: `self.dropout(x + y)`."""
    residual = trained_like(Residual(nn.LayerNorm(H), FeedForward(H, 2), 0.5).double())
    x = signal(4, 100, H)
    residual.eval()
    branch = residual(x)[0] - x
    residual.train()
    torch.manual_seed(0)
    dropped = residual(x)[0] - x
    kept = dropped.abs() > 1e-12
    assert 0.4 < kept.double().mean() < 0.6
    assert relative(dropped[kept], 2 * branch[kept]) < 1e-12


# --- pooling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_weight", [False, True])
def test_down_pool_orders_features_by_channel(normalize_weight: bool) -> None:
    """Feature h·p + s of a block is channel h at its sample s, as in released checkpoints.

    Mutation: in step, `block.flatten(-2)` -> `block.mT.flatten(-2)` (forward and step agree, so only this test fails).
    """
    pool = trained_like(DownPool(H, EXPAND, POOL, normalize_weight).double())
    x = signal(2, 3 * POOL, H)
    features = torch.stack([x[:, s::POOL, h] for h in range(H) for s in range(POOL)], dim=-1)
    expected = features @ pool.linear.weight.T + pool.linear.bias
    assert expected.shape == (2, 3, H * EXPAND)
    assert relative(pool(x), expected) < 1e-13
    assert relative(pool.step(x[:, :POOL].mT), expected[:, 0]) < 1e-13


@pytest.mark.parametrize("normalize_weight", [False, True])
def test_up_pool_plays_the_block_before(normalize_weight: bool) -> None:
    """Block j of the output is made from step j − 1 (feature h·p + s again), and the first is zeros, not the bias.

    Mutations: in forward, `torch.cat((head…, blocks[:, :-1]))` -> `blocks`; shift x before `self.step`.
    """
    pool = trained_like(UpPool(H, EXPAND, POOL, normalize_weight).double())
    x = signal(2, 3, H * EXPAND)
    features = x @ pool.linear.weight.T + pool.linear.bias  # (2, 3, H·p)
    expected = torch.zeros(2, 3 * POOL, H, dtype=torch.float64)
    for t in range(POOL, 3 * POOL):
        for h in range(H):
            expected[:, t, h] = features[:, t // POOL - 1, h * POOL + t % POOL]
    y, last = pool(x)
    assert relative(y, expected) < 1e-13
    assert torch.equal(y[:, :POOL], torch.zeros_like(y[:, :POOL]))
    assert relative(last, pool.step(x[:, -1])) < 1e-13


@pytest.mark.parametrize("normalize_weight", [False, True])
def test_pools_forward_equals_step(normalize_weight: bool) -> None:
    """Law 2 of the pools: whole, in two pieces with the block carried over, and block by block.

    Mutation: in UpPool.forward, `head = self.first(len(x))` whatever `first` is.
    """
    down = trained_like(DownPool(H, EXPAND, POOL, normalize_weight).double())
    up = trained_like(UpPool(H, EXPAND, POOL, normalize_weight).double())
    x = signal(2, 5 * POOL, H)
    pooled = down(x)
    assert relative(torch.stack([down.step(b.mT) for b in x.split(POOL, 1)], dim=1), pooled) < 1e-13

    whole, last = up(pooled)
    first, block = up(pooled[:, :2])
    second, end = up(pooled[:, 2:], block)
    assert relative(torch.cat((first, second), dim=1), whole) < 1e-13
    assert relative(end, last) < 1e-13
    stepped = [up.first(2), *(up.step(step) for step in pooled.unbind(1))]
    assert relative(torch.cat([b.mT for b in stepped[:-1]], dim=1), whole) < 1e-13


def test_weight_norm_keeps_the_originals_parameters() -> None:
    """weight = g·v/|v| by output feature, so that released weight_g (O, 1) and weight_v (O, I) fit.

    Mutation: `self.linear = linear` whatever `normalize_weight` is.
    """
    for pool, outputs, inputs in (
        (DownPool(H, EXPAND, POOL, True), H * EXPAND, H * POOL),
        (UpPool(H, EXPAND, POOL, True), H * POOL, H * EXPAND),
    ):
        trained_like(pool)
        g = pool.get_parameter("linear.parametrizations.weight.original0")
        v = pool.get_parameter("linear.parametrizations.weight.original1")
        assert g.shape == (outputs, 1)
        assert v.shape == (outputs, inputs)
        assert relative(pool.linear.weight, g * v / v.norm(dim=1, keepdim=True)) < 1e-6
