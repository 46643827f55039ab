"""SaShiMi: a recursive tier of S4 layers and pooling over embedded samples (arXiv 2202.09729, section 4).

Shapes: **B** batch, **L** samples, **H** channels, **p** pooling factor, **V** levels.
The model never shifts: `inputs[:, t]` is sample t − 1, and its logits predict sample t.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sashimi.errors import InputError
from sashimi.layers import DownPool, FeedForward, Residual, S4Block, ScalarNorm, UpPool
from sashimi.linear import Linear
from sashimi.s4 import S4, Made, S4State, make

_SCAN_PIECE = 1 << 16  # samples a call when a state is carried: bounds the memory of long prompts


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; it follows from these alone, never from the data or the training length."""

    levels: int = 256
    """Number of sample values V; must equal 2 ** audio.bits."""
    d_model: int = 64
    """Channels at the audio rate; each tier multiplies them by `expand`."""
    n_layers: int = 8
    """S4 layers a tier, each followed by a feed-forward layer."""
    pool: tuple[int, ...] = (4, 4)
    """Downsampling factor between tiers, from the audio rate to the centre."""
    expand: int = 2
    """Widening of each tier over the one above."""
    ff: int = 2
    """Widening inside the feed-forward layers."""
    d_state: int = 64
    """Real states a channel (N); half as many complex modes are stored."""
    glu: bool = True
    """Gate the output of each S4 layer (Linear of twice the width, then GLU)."""
    unet: bool = False
    """Layers on the way down too, each with a skip to its mirror image ("sashimi" backbone if false)."""
    norm: Literal["layer", "scalar"] = "layer"
    """Residual norm: LayerNorm, or the original training code's one scale and shift a layer."""
    weight_norm: bool = False
    """Weight normalization of the pooling layers, as in the original training code."""
    tie_state: bool = True
    """Share A, P and B between the channels of a layer (n_ssm = 1)."""
    mode: Literal["dplr", "diag"] = "dplr"
    """State matrix: diagonal plus low rank (S4) or diagonal (S4D)."""
    dt_transform: Literal["exp", "softplus"] = "exp"
    """Map from the learnt parameter to the time step dt."""
    dt_min: float = 0.001
    """Smallest initial time step (in samples of the tier)."""
    dt_max: float = 0.1
    """Largest initial time step (in samples of the tier)."""
    kernel: Literal["krylov", "vandermonde", "cauchy", "cauchy_keops"] = "krylov"
    """Kernel algorithm; all give the same kernel. mode=diag takes vandermonde, mode=dplr the others."""
    dropout: float = 0.0
    """Dropout probability on each residual branch."""

    def __post_init__(self) -> None:
        for field in ("d_model", "n_layers", "expand", "ff"):
            if getattr(self, field) < 1:
                raise InputError(f"model.{field}={getattr(self, field)}: must be at least 1")
        most = (("d_model", 1 << 16), ("n_layers", 1000), ("d_state", 1 << 10), ("ff", 1 << 10))  # slips, not models
        for field, bound in most:
            if getattr(self, field) > bound:
                raise InputError(f"model.{field}={getattr(self, field)}: must be at most {bound}")
        if len(self.pool) > 16 or self.d_model * self.expand ** len(self.pool) > 1 << 20:
            raise InputError(
                f"model.pool={list(self.pool)}, expand={self.expand}: the innermost tier would be wider than {1 << 20} "
                "channels, or more than 16 tiers down; pool or expand less"
            )
        if not 2 <= self.levels <= 1 << 16:
            raise InputError(f"model.levels={self.levels}: must be 2 to 65536, normally 2 ** audio.bits")
        if any(p < 2 for p in self.pool):
            raise InputError(f"model.pool={list(self.pool)}: every factor must be at least 2")
        if self.d_state < 2 or self.d_state % 2:
            raise InputError(f"model.d_state={self.d_state}: must be even and at least 2 (conjugate pairs)")
        if not 0 < self.dt_min <= self.dt_max:
            raise InputError(f"model.dt_min={self.dt_min}, dt_max={self.dt_max}: need 0 < dt_min <= dt_max")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout={self.dropout}: must be in [0, 1)")
        for field in ("norm", "mode", "dt_transform", "kernel"):
            choices = get_args(get_type_hints(ModelConfig)[field])
            if getattr(self, field) not in choices:
                raise InputError(f"model.{field}={getattr(self, field)}: choose one of {', '.join(choices)}")
        if (self.mode == "diag") != (self.kernel == "vandermonde"):
            remedy = "vandermonde" if self.mode == "diag" else "krylov, cauchy or cauchy_keops"
            raise InputError(f"model.kernel={self.kernel} does not fit model.mode={self.mode}: use {remedy}")

    @property
    def total_pool(self) -> int:
        """Samples a step of the innermost tier."""
        return math.prod(self.pool)


class PooledState(NamedTuple):
    """What the slower rate remembers between samples."""

    pending: Tensor  # (B, H, p) samples of the block being collected
    tier: "TierState"
    current: Tensor  # (B, H, p) what the tier inside said of the block being played


class TierState(NamedTuple):
    """What a tier remembers between samples."""

    down: tuple[S4State | None, ...]  # unet layers on the way down
    pooled: PooledState | None
    layers: tuple[S4State | None, ...]


class SashimiState(NamedTuple):
    """A model's state: tensors, and the position within a total pooling period."""

    tier: TierState
    phase: int


def map_states(function: Callable[..., Tensor], *states: TierState) -> TierState:
    """`function` of the tensors of states of the same form; each S4State keeps its first recurrence."""

    def layer(*parts: S4State | None) -> S4State | None:
        return parts[0] and parts[0]._replace(x=function(*(part.x for part in parts if part)))

    pooled = None
    if states[0].pooled is not None:
        inner = [state.pooled for state in states if state.pooled]
        pending, current = (function(*(getattr(i, name) for i in inner)) for name in ("pending", "current"))
        pooled = PooledState(pending, map_states(function, *(i.tier for i in inner)), current)
    down, layers = (
        tuple(layer(*parts) for parts in zip(*(getattr(state, name) for state in states), strict=True))
        for name in ("down", "layers")
    )
    return TierState(down, pooled, layers)


class Parts(NamedTuple):
    """The classes of the layers; models of other code's making bring their own."""

    s4: type[S4] = S4
    s4_block: type[S4Block] = S4Block
    feed_forward: type[FeedForward] = FeedForward
    up_pool: type[UpPool] = UpPool


OWN_PARTS = Parts()


class Pooled(nn.Module):
    """The tier inside, at 1/p of the rate: down, tier, up. Its output at a block depends on earlier blocks alone."""

    def __init__(self, config: ModelConfig, depth: int, parts: Parts) -> None:
        super().__init__()
        self.d_model, self.pool = config.d_model * config.expand**depth, config.pool[depth]
        self.down = DownPool(self.d_model, config.expand, self.pool, config.weight_norm)
        self.tier = Tier(config, depth + 1, parts)
        self.up = parts.up_pool(self.d_model, config.expand, self.pool, config.weight_norm)

    def forward(self, x: Tensor, state: PooledState | None = None) -> tuple[Tensor, PooledState | None]:
        """x: (B, L, H) -> (B, L, H); p divides L, and a state is at the start of a block."""
        if state is None:
            y, _ = self.tier(self.down(x))
            y, _ = self.up(y)
            return y, None
        y, tier = self.tier(self.down(x), state.tier)
        y, current = self.up(y, state.current)
        return y, PooledState(state.pending, tier, current)

    def step(self, x: Tensor, state: PooledState, phase: int) -> tuple[Tensor, PooledState]:
        """One sample of `forward`; the tier inside runs at the end of each block. x: (B, H) -> (B, H)."""
        slot = phase % self.pool
        pending, tier, current = state.pending.clone(), state.tier, state.current
        pending[..., slot] = x
        y = current[..., slot]
        if slot == self.pool - 1:
            pooled, tier = self.tier.step(self.down.step(pending), tier, phase // self.pool)
            current = self.up.step(pooled)
        return y, PooledState(pending, tier, current)

    def init_state(self, batch_size: int) -> PooledState:
        """The state at a recording's start."""
        block = next(self.parameters()).new_zeros(batch_size, self.d_model, self.pool)
        return PooledState(block, self.tier.init_state(batch_size), self.up.first(batch_size))


class Tier(nn.Module):
    """One sampling rate: (unet: layers on the way down,) what the slower tiers say, then this tier's layers."""

    def __init__(self, config: ModelConfig, depth: int, parts: Parts) -> None:
        super().__init__()
        d_model = config.d_model * config.expand**depth
        innermost = depth == len(config.pool)
        self.unet = config.unet and not innermost
        self.outer_skip = not self.unet  # around all the layers
        self.recompute = False
        self.down = _layers(config, d_model, parts) if self.unet else Layers()
        self.pooled = None if innermost else Pooled(config, depth, parts)
        self.layers = _layers(config, d_model, parts)

    def forward(self, x: Tensor, state: TierState | None = None) -> tuple[Tensor, TierState | None]:
        """x: (B, L, H) -> (B, L, H), from and to a state at phase 0 if one is given; the pools must divide L."""
        skips, down, pooled, layers = [], [], None, []
        made = self._make(x.shape[1], carried=state is not None)
        for i, layer in enumerate(self.down):
            skips.append(x)
            x, layer_state = self._run(layer, x, state and state.down[i], made.get(layer))
            down.append(layer_state)
        if self.pooled is not None:
            above, pooled = self.pooled(x, state and state.pooled)
            x = x + above
        entry = x
        for i, layer in enumerate(self.layers):
            x, layer_state = self._run(layer, x, state and state.layers[i], made.get(layer))
            layers.append(layer_state)
            if self.unet:
                x = x + skips.pop()
        if self.outer_skip:
            x = x + entry
        return x, state and TierState(tuple(down), pooled, tuple(layers))

    def _make(self, length: int, carried: bool) -> dict[Residual, Made | None]:
        """The kernels or systems of all layers, made together; none if they are to be recomputed with their layers."""
        if self.recompute:
            return {}
        blocks = {layer: layer.layer.s4 for layer in (*self.down, *self.layers) if isinstance(layer.layer, S4Block)}
        return dict(zip(blocks, make(list(blocks.values()), length, carried), strict=True))

    def _run(
        self, layer: Residual, x: Tensor, state: S4State | None, made: Made | None
    ) -> tuple[Tensor, S4State | None]:
        if self.recompute:
            return checkpoint(layer, x, state, use_reentrant=False, preserve_rng_state=layer.dropout.p > 0)
        return layer(x, state, made)

    def step(self, x: Tensor, state: TierState, phase: int) -> tuple[Tensor, TierState]:
        """One sample of `forward`; phase counts this tier's samples. x: (B, H) -> (B, H)."""
        skips, down, pooled, layers = [], [], state.pooled, []
        for layer, layer_state in zip(self.down, state.down, strict=True):
            skips.append(x)
            x, layer_state = layer.step(x, layer_state)
            down.append(layer_state)
        if self.pooled is not None and state.pooled is not None:
            above, pooled = self.pooled.step(x, state.pooled, phase)
            x = x + above
        entry = x
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x, layer_state = layer.step(x, layer_state)
            layers.append(layer_state)
            if self.unet:
                x = x + skips.pop()
        if self.outer_skip:
            x = x + entry
        return x, TierState(tuple(down), pooled, tuple(layers))

    def init_state(self, batch_size: int) -> TierState:
        """The state at a recording's start."""
        return TierState(
            tuple(layer.init_state(batch_size) for layer in self.down),
            None if self.pooled is None else self.pooled.init_state(batch_size),
            tuple(layer.init_state(batch_size) for layer in self.layers),
        )


class Layers(nn.ModuleList):
    """A list of residual layers, typed."""

    def __iter__(self) -> Iterator[Residual]:
        return super().__iter__()  # type: ignore[return-value]


def _layers(config: ModelConfig, d_model: int, parts: Parts) -> Layers:
    def residual(layer: S4Block | FeedForward) -> Residual:
        norm = nn.LayerNorm(d_model) if config.norm == "layer" else ScalarNorm()
        return Residual(norm, layer, config.dropout)

    layers = Layers()
    for _ in range(config.n_layers):
        s4 = parts.s4(
            d_model,
            d_state=config.d_state,
            tie_state=config.tie_state,
            mode=config.mode,
            dt_transform=config.dt_transform,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            kernel=config.kernel,
        )
        layers.append(residual(parts.s4_block(s4, d_model, config.glu)))
        layers.append(residual(parts.feed_forward(d_model, config.ff)))
    return layers


class Sashimi(nn.Module):
    """An autoregressive model of samples: logits of sample t from samples < t."""

    def __init__(self, config: ModelConfig, parts: Parts = OWN_PARTS) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.levels, config.d_model)
        self.tier = Tier(config, 0, parts)
        self.norm: nn.Module = nn.LayerNorm(config.d_model)
        self.head = Linear(config.d_model, config.levels)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (B, L) int64, any L >= 1 -> logits (B, L, V). Padded inside on the right, which causality hides."""
        return self.read_out(self.features(inputs)[0])

    def features(self, inputs: Tensor, state: SashimiState | None = None) -> tuple[Tensor, SashimiState | None]:
        """What `read_out` makes logits of, sample by sample: inputs (B, L) -> (B, L, H).

        A state is carried if one is given, at phase 0; the total pooling then divides L.
        """
        length = inputs.shape[1]
        assert state is None or (state.phase == 0 and length % self.config.total_pool == 0)
        x = self.embedding(F.pad(inputs, (0, -length % self.config.total_pool)))
        x, tier = self.tier(x, state and state.tier)
        return x[:, :length], tier and SashimiState(tier, 0)

    def recompute_layers(self) -> None:
        """From now on keep no more than each layer's input for the gradient, and compute the layer once more for it."""
        for module in self.modules():
            if isinstance(module, Tier):
                module.recompute = True

    def read_out(self, x: Tensor) -> Tensor:
        """x: (..., H) -> logits (..., V)."""
        return self.head(self.norm(x))

    def step(self, inputs: Tensor, state: SashimiState) -> tuple[Tensor, SashimiState]:
        """One sample of `forward`. inputs: (B,) int64 -> logits (B, V)."""
        x, tier = self.tier.step(self.embedding(inputs), state.tier, state.phase)
        phase = (state.phase + 1) % self.config.total_pool
        return self.read_out(x), SashimiState(tier, phase)

    def prefill(self, inputs: Tensor, state: SashimiState) -> tuple[Tensor, SashimiState]:
        """Take in a prompt: by whole pooling periods at once, and by `step` for the rest.

        inputs: (B, L) int64, L >= 1 -> logits after the last sample (B, V). Pieces bound the memory of long prompts.
        """
        total = self.config.total_pool
        head = min(-state.phase % total, inputs.shape[1])
        aligned = head + (inputs.shape[1] - head) // total * total
        logits = None
        for sample in inputs[:, :head].unbind(1):
            logits, state = self.step(sample, state)
        piece = max(_SCAN_PIECE // total, 1) * total
        for start in range(head, aligned, piece):
            x, after = self.features(inputs[:, start : min(start + piece, aligned)], state)
            assert after is not None
            logits, state = self.read_out(x[:, -1]), after
        for sample in inputs[:, aligned:].unbind(1):
            logits, state = self.step(sample, state)
        if logits is None:
            raise InputError("prefill: the prompt is empty, give it at least one sample")
        return logits, state

    def init_state(self, batch_size: int) -> SashimiState:
        """The state at a recording's start, on the model's device. Discretizes: make it anew after an update."""
        return SashimiState(self.tier.init_state(batch_size), 0)
