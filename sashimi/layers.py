"""What surrounds the state space: norms, feed-forward, residual, pooling; each over a sequence and by the sample.

Shapes: **B** batch, **L** samples, **H** channels, **p** pooling factor.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sashimi.linear import Linear
from sashimi.s4 import S4, Made, S4State


class ScalarNorm(nn.Module):
    """The original's norm: y = (s/σ)(x − μ + m) over channels, one scale s and one shift m a layer, no epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(1))
        self.s = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., H) -> (..., H); statistics in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(self.s.dtype, torch.float32))
            std, mean = torch.std_mean(wide, dim=-1, correction=0, keepdim=True)
            return ((self.s / std) * (wide - mean + self.m)).to(x.dtype)


class FeedForward(nn.Module):
    """Linear (×ff) → GELU → Linear. Has no state."""

    def __init__(self, d_model: int, ff: int) -> None:
        super().__init__()
        self.expand = Linear(d_model, ff * d_model)
        self.contract = Linear(ff * d_model, d_model)

    def forward(self, x: Tensor, state: None = None, made: None = None) -> tuple[Tensor, None]:
        """x: (..., H) -> (..., H)."""
        return self.contract(self.expand(x), gelu=True), None

    def step(self, x: Tensor, state: None) -> tuple[Tensor, None]:
        """x: (B, H) -> (B, H)."""
        return self.forward(x)

    def init_state(self, batch_size: int) -> None:
        """A feed-forward layer remembers nothing."""


class S4Block(nn.Module):
    """S4 → GELU → Linear, or with `glu` a Linear of twice the width and a GLU."""

    def __init__(self, s4: S4, d_model: int, glu: bool) -> None:
        super().__init__()
        self.s4 = s4
        self.glu = glu
        self.output = Linear(d_model, 2 * d_model if glu else d_model)

    def mix(self, y: Tensor) -> Tensor:
        """What follows the state space, sample by sample. y: (..., H) -> (..., H)."""
        return self.output(y, gelu=True, glu=self.glu)

    def forward(
        self, u: Tensor, state: S4State | None = None, made: Made | None = None
    ) -> tuple[Tensor, S4State | None]:
        """u: (B, L, H) -> (B, L, H); `made` as in `S4.forward`."""
        y, state = self.s4(u, state, made)
        return self.mix(y), state

    def step(self, u: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """u: (B, H) -> (B, H)."""
        y, state = self.s4.step(u, state)
        return self.mix(y), state

    def init_state(self, batch_size: int) -> S4State:
        """The state space's own."""
        return self.s4.init_state(batch_size)


class Residual(nn.Module):
    """x + layer(norm(x)), the pre-norm residual of every layer."""

    def __init__(self, norm: nn.Module, layer: S4Block | FeedForward, dropout: float) -> None:
        super().__init__()
        self.norm, self.layer = norm, layer
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: S4State | None = None, made: Made | None = None
    ) -> tuple[Tensor, S4State | None]:
        """x: (B, L, H) -> (B, L, H); `made` as in `S4.forward`."""
        y, state = self.layer(self.norm(x), state, made)
        return x + self.dropout(y), state

    def step(self, x: Tensor, state: S4State | None) -> tuple[Tensor, S4State | None]:
        """x: (B, H) -> (B, H)."""
        y, state = self.layer.step(self.norm(x), state)  # type: ignore[arg-type]
        return x + y, state

    def init_state(self, batch_size: int) -> S4State | None:
        """The layer's own, or None."""
        return self.layer.init_state(batch_size)


def compile_layers(model: nn.Module, backend: Any = "inductor") -> None:
    """From now on run each `Residual` of a model by torch.compile, which makes fewer and larger kernels of it.

    `backend` as in torch.compile. Each shape of inputs is compiled for itself. Two settings of torch change for the
    whole process: how many graphs a function may have, and that compiled gradients are computed without autocast.
    """
    from torch._functorch import config as functorch  # takes a second

    _allow_graphs()
    # Gradients as without compiling: by no autocast. Else those of the state space would be bfloat16's.
    functorch.backward_pass_autocast = "off"
    for module in model.modules():
        if isinstance(module, Residual):
            module.compile(backend=backend, dynamic=False)


def compile_steps(model: nn.Module) -> None:
    """From now on take each `Residual`'s steps by torch.compile. One setting changes, as in `compile_layers`."""
    _allow_graphs()
    for module in model.modules():
        if isinstance(module, Residual):
            module.step = torch.compile(module.step, dynamic=False)  # type: ignore[method-assign]


def _allow_graphs() -> None:
    """One for each kind of layer of each tier, with and without gradients: more than the 8 that are allowed."""
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)


class DownPool(nn.Module):
    """p samples of H channels become one of H·expand: reshape to features (h, s), then Linear."""

    def __init__(self, d_model: int, expand: int, pool: int, normalize_weight: bool) -> None:
        super().__init__()
        self.pool = pool
        linear = Linear(d_model * pool, d_model * expand)
        self.linear = weight_norm(linear) if normalize_weight else linear

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, H) -> (B, L/p, H·expand)."""
        return self.step(x.unflatten(1, (-1, self.pool)).mT)

    def step(self, block: Tensor) -> Tensor:
        """One block of p samples. block: (..., H, p) -> (..., H·expand)."""
        return self.linear(block.flatten(-2))


class UpPool(nn.Module):
    """One pooled step becomes the p samples of the *next* block: Linear, shift by one block, reshape.

    The shift follows the Linear: before it, the first block would hold the bias instead of zeros.
    """

    def __init__(self, d_model: int, expand: int, pool: int, normalize_weight: bool) -> None:
        super().__init__()
        self.d_model, self.pool = d_model, pool
        linear = Linear(d_model * expand, d_model * pool)
        self.linear = weight_norm(linear) if normalize_weight else linear

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, L/p, H·expand), first: the block (B, H, p) before, or None at a start -> (B, L, H), next block."""
        blocks = self.step(x)  # (B, L/p, H, p)
        # Block j may only see blocks < j, or a sample would see its own future.
        head = self.first(len(x)) if first is None else first
        shifted = torch.cat((head.unsqueeze(1).to(blocks.dtype), blocks[:, :-1]), dim=1)
        return shifted.mT.flatten(1, 2), blocks[:, -1]

    def step(self, x: Tensor) -> Tensor:
        """x: (..., H·expand) -> the block that follows, (..., H, p)."""
        return self.linear(x).unflatten(-1, (-1, self.pool))

    def first(self, batch_size: int) -> Tensor:
        """The block at a recording's start, before any pooled step: zeros, (B, H, p)."""
        return next(self.parameters()).new_zeros(batch_size, self.d_model, self.pool)
