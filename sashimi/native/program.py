"""A model as arrays: its parameters in the order in which they are read, and what is done with them.

A *program* for each phase of the pooling period lists the operations of one sample, those of the slower tiers where
they fall due. It knows the project's own layers.

Shapes: **B** batch, **H** channels, **N** state, **p** pooling factor, **W** numbers in a vector.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sashimi.errors import Unavailable
from sashimi.layers import FeedForward, Residual, S4Block, ScalarNorm, UpPool
from sashimi.model import Pooled, PooledState, Sashimi, Tier, TierState
from sashimi.s4 import S4State

# As in generate.cpp.
BYTES = 64
EMBED, NORM, STATE_SPACE, LINEAR, GLU, ADD, COPY, END = range(8)
GELU, RESIDUAL = 1, 2  # flags of LINEAR
TILE = {True: 4, False: 8}  # by whether it is for a single clip


class _Slots(NamedTuple):
    """Places in the memory, in vectors, of what a tier works on."""

    x: int
    normed: int
    mixed: int
    wide: int
    entry: int
    skips: tuple[int, ...]


class _Pool(NamedTuple):
    """Places in the memory and in the parameters, of one pooling."""

    pending: int
    current: int
    down: int
    up: int


class Program:
    """Lays out parameters, memory and programs of one model, for one clip (`single`) or W of them at a time."""

    def __init__(self, model: Sashimi, single: bool) -> None:
        self.dtype = np.dtype(str(model.head.weight.dtype).removeprefix("torch."))
        self.single, self.width = single, BYTES // self.dtype.itemsize
        self.tile = TILE[single]
        self.size = 0  # of the memory, in vectors
        self.n_params = 0
        self.parts: list[np.ndarray] = []
        self.places: dict[nn.Module, Any] = {}  # parameters of layers; slots of tiers; both of pools and state spaces
        self._place_tier(model.tier)
        width = model.config.d_model
        self.embedding = self._keep(_array(model.embedding.weight))
        self.places[model.norm] = self._norm(model.norm)
        self.places[model.head] = self._linear(model.head.weight, model.head.bias)
        self.logits = self._reserve(model.config.levels)
        self.phases = [self._phase(model, width, phase) for phase in range(model.config.total_pool)]
        self.params = self._aligned(np.concatenate(self.parts))

    # parameters and memory

    def _keep(self, part: np.ndarray) -> int:
        """The place of a part; each begins at a whole vector."""
        part = np.pad(part.ravel(), (0, -part.size % self.width))
        place, self.n_params = self.n_params, self.n_params + part.size
        self.parts.append(part)
        return place

    def units(self, n: int) -> int:
        """Vectors that n features take."""
        return -(-n // self.width) if self.single else n

    def _reserve(self, n: int) -> int:
        place, self.size = self.size, self.size + self.units(n)
        return place

    def _padded(self, n: int) -> int:
        """Numbers that n features take, of one clip."""
        return self.units(n) * self.width if self.single else n

    def _linear(self, weight: Tensor, bias: Tensor, halves: int = 1) -> int:
        """Tiles of output: biases, then the weights input by input. weight (O, I), bias (O,); each half padded."""
        rows = np.concatenate((_array(bias)[:, None], _array(weight)), axis=1)  # (O, 1 + I)
        size = len(rows) // halves
        rows = np.pad(rows.reshape(halves, size, -1), ((0, 0), (0, self._padded(size) - size), (0, 0)))
        rows = rows.reshape(-1, rows.shape[-1])
        block = self.tile * (self.width if self.single else 1)
        rows = np.pad(rows, ((0, -len(rows) % block), (0, 0)))
        return self._keep(rows.reshape(-1, block, rows.shape[1]).transpose(0, 2, 1))

    def _norm(self, norm: nn.Module) -> int:
        if isinstance(norm, ScalarNorm):
            return self._keep(np.array([0.0, norm.s.item(), norm.m.item()]))
        assert isinstance(norm, nn.LayerNorm)
        return self._keep(np.concatenate(([norm.eps], _array(norm.weight), _array(norm.bias))))

    def _state_space(self, block: S4Block) -> tuple[int, int, int, int]:
        """Parameters, state, modes, whether A has a low-rank part. A row (H, 1 + 10 N/2) holds all of a channel."""
        r = block.s4.recurrence()
        H, modes = r.decay_real.shape
        zero = torch.zeros(H, 2 * modes)
        a, b = (zero if v is None else v for v in (r.a, r.b))
        halves = (*b.chunk(2, -1), r.decay_real, r.decay_imag, *a.chunk(2, -1), *r.B.chunk(2, -1), *r.C.chunk(2, -1))
        modes_of = np.stack([_array(half) for half in halves], axis=-1).reshape(H, -1)
        rows = np.concatenate((_array(block.s4.D)[:, None], modes_of), axis=1)
        if self.single:
            rows = np.pad(rows, ((0, -H % self.width), (0, 0))).reshape(-1, self.width, rows.shape[1]).swapaxes(1, 2)
        place, self.size = self.size, self.size + self.units(H) * 2 * modes
        return self._keep(rows), place, modes, int(r.a is not None)

    def _place_layers(self, layers: list[Residual]) -> None:
        for residual in layers:
            layer = residual.layer
            self.places[residual.norm] = self._norm(residual.norm)
            if type(layer) is S4Block:
                self.places[layer] = self._state_space(layer)
                self.places[layer.output] = self._linear(layer.output.weight, layer.output.bias, 1 + layer.glu)
            elif type(layer) is FeedForward:
                for linear in (layer.expand, layer.contract):
                    self.places[linear] = self._linear(linear.weight, linear.bias)
            else:
                raise Unavailable(f"it has no {type(layer).__name__}")

    def _place_tier(self, tier: Tier) -> None:
        H = _width(tier)
        layers = [*tier.down, *tier.layers]
        widest = max(
            [2 * self._padded(H)] + [r.layer.expand.out_features for r in layers if isinstance(r.layer, FeedForward)]
        )
        x, normed, mixed, wide, entry = (self._reserve(n) for n in (H, H, H, widest, H))
        skips = tuple(self._reserve(H) for _ in tier.down)
        self.places[tier] = _Slots(x, normed, mixed, wide, entry, skips)
        self._place_layers(layers)
        if tier.pooled is not None:
            self._place_pooled(tier.pooled)

    def _place_pooled(self, pooled: Pooled) -> None:
        if type(pooled.up) is not UpPool:
            raise Unavailable(f"it has no {type(pooled.up).__name__}")
        H, p = pooled.d_model, pooled.pool
        padding = self._padded(H) - H
        # Blocks lie sample by sample, (p, H); the model's own features are ordered (h, s).
        down = pooled.down.linear.weight.unflatten(1, (H, p)).mT  # (out, p, H)
        down = nn.functional.pad(down, (0, padding)).flatten(1)
        up, bias = (t.unflatten(0, (H, p)).transpose(0, 1) for t in (pooled.up.linear.weight, pooled.up.linear.bias))
        up = nn.functional.pad(up, (0, 0, 0, padding)).flatten(0, 1)  # (p·H, in)
        bias = nn.functional.pad(bias, (0, padding)).flatten()
        pending, current = (self._reserve(self._padded(H) * p) for _ in range(2))
        matrices = (self._linear(down, pooled.down.linear.bias), self._linear(up, bias))
        self.places[pooled] = _Pool(pending, current, *matrices)
        self._place_tier(pooled.tier)

    def memory(self) -> np.ndarray:
        """Zeros (size, W), aligned to whole vectors."""
        return self._aligned(np.zeros(self.size * self.width)).reshape(self.size, self.width)

    def _aligned(self, values: np.ndarray) -> np.ndarray:
        raw = np.zeros(values.size * self.dtype.itemsize + BYTES, dtype=np.uint8)
        start = -raw.ctypes.data % BYTES
        copy = raw[start : start + values.size * self.dtype.itemsize].view(self.dtype)
        copy[:] = values.ravel()
        return copy

    # operations

    def _phase(self, model: Sashimi, H: int, phase: int) -> np.ndarray:
        slots: _Slots = self.places[model.tier]
        ops = [[EMBED, 0, slots.x, 0, 0, H, self.embedding, 0], *self._run_tier(model.tier, phase)]
        ops.append(self._normalize(model.norm, slots.x, slots.normed, H))
        levels = model.config.levels
        ops.append([LINEAR, slots.normed, self.logits, 0, H, levels, self.places[model.head], 0])
        ops.append([END, self.logits, 0, 0, 0, 0, 0, 0])
        return np.array(ops, dtype=np.int64)

    def _normalize(self, norm: nn.Module, source: int, to: int, H: int) -> list[int]:
        return [NORM, source, to, 0, H, H, self.places[norm], int(isinstance(norm, ScalarNorm))]

    def _run_layer(self, residual: Residual, slots: _Slots, H: int) -> list[list[int]]:
        x, normed, mixed, wide = slots.x, slots.normed, slots.mixed, slots.wide
        ops, layer = [self._normalize(residual.norm, x, normed, H)], residual.layer
        if isinstance(layer, FeedForward):
            inner = layer.expand.out_features
            ops.append([LINEAR, normed, wide, 0, H, inner, self.places[layer.expand], GELU])
            ops.append([LINEAR, wide, x, x, inner, H, self.places[layer.contract], RESIDUAL])
            return ops
        params, state, modes, low_rank = self.places[layer]
        ops.append([STATE_SPACE, normed, mixed, state, H, modes, params, low_rank])
        output = self.places[layer.output]
        if layer.glu:
            ops.append([LINEAR, mixed, wide, 0, H, 2 * self._padded(H), output, 0])
            ops.append([GLU, wide, x, x, 0, H, 0, 0])
        else:
            ops.append([LINEAR, mixed, x, x, H, H, output, RESIDUAL])
        return ops

    def _run_tier(self, tier: Tier, phase: int) -> list[list[int]]:
        """The operations of `Tier.step`, on what is in the tier's slot x."""
        H, slots = _width(tier), self.places[tier]
        x, ops = slots.x, []
        for residual, skip in zip(tier.down, slots.skips, strict=True):
            ops.append([COPY, x, skip, 0, 0, H, 0, 0])
            ops += self._run_layer(residual, slots, H)
        if tier.pooled is not None:
            pool, p = self.places[tier.pooled], tier.pooled.pool
            slot = phase % p * self.units(H)
            ops.append([COPY, x, pool.pending + slot, 0, 0, H, 0, 0])
            ops.append([ADD, x, x, pool.current + slot, 0, H, 0, 0])
            if phase % p == p - 1:
                inner, block = tier.pooled.tier, p * self._padded(H)
                slower = self.places[inner].x
                ops.append([LINEAR, pool.pending, slower, 0, block, _width(inner), pool.down, 0])
                ops += self._run_tier(inner, phase // p)
                ops.append([LINEAR, slower, pool.current, 0, _width(inner), block, pool.up, 0])
        if tier.outer_skip:
            ops.append([COPY, x, slots.entry, 0, 0, H, 0, 0])
        for i, residual in enumerate(tier.layers):
            ops += self._run_layer(residual, slots, H)
            if tier.unet:
                ops.append([ADD, x, x, slots.skips[-1 - i], 0, H, 0, 0])
        if tier.outer_skip:
            ops.append([ADD, x, x, slots.entry, 0, H, 0, 0])
        return ops

    # states

    def load(self, memory: np.ndarray, tier: Tier, state: TierState) -> None:
        """Write a state of up to W clips into a memory (size, W)."""
        for residual, x in (*zip(tier.down, state.down, strict=True), *zip(tier.layers, state.layers, strict=True)):
            if x is not None:
                self._modes(memory, residual.layer, x.x)
        if tier.pooled is not None and state.pooled is not None:
            pool = self.places[tier.pooled]
            self._blocks(memory, pool.pending, state.pooled.pending)
            self._blocks(memory, pool.current, state.pooled.current)
            self.load(memory, tier.pooled.tier, state.pooled.tier)

    def store(self, memory: np.ndarray, tier: Tier, before: TierState) -> TierState:
        """The state in a memory, of as many clips as `before`."""

        def after(layers: Iterable[Residual], states: tuple[S4State | None, ...]) -> tuple[S4State | None, ...]:
            pairs = zip(layers, states, strict=True)
            return tuple(s and s._replace(x=self._modes(memory, r.layer, s.x, read=True)) for r, s in pairs)

        pooled = before.pooled
        if tier.pooled is not None and pooled is not None:
            pool = self.places[tier.pooled]
            pending = self._blocks(memory, pool.pending, pooled.pending, read=True)
            current = self._blocks(memory, pool.current, pooled.current, read=True)
            pooled = PooledState(pending, self.store(memory, tier.pooled.tier, pooled.tier), current)
        return TierState(after(tier.down, before.down), pooled, after(tier.layers, before.layers))

    def _modes(self, memory: np.ndarray, block: nn.Module, x: Tensor, read: bool = False) -> Tensor:
        """Write x (B, H, N) into a state space's place; or read what is there, in x's shape."""
        _, place, modes, _ = self.places[block]
        (B, H, _), padding = x.shape, -x.shape[1] % self.width
        there = memory[place : place + self.units(H) * 2 * modes].reshape(-1, modes, 2, self.width)
        if not read:
            rows = x.unflatten(-1, (2, modes)).permute(1, 3, 2, 0).numpy()  # (H, N/2, 2, B)
            if self.single:
                rows = np.pad(rows[..., 0], ((0, padding), (0, 0), (0, 0)))
                there[:] = rows.reshape(-1, self.width, modes, 2).transpose(0, 2, 3, 1)
            else:
                there[..., :B] = rows
            return x
        rows = there.transpose(0, 3, 1, 2).reshape(-1, modes, 2, 1)[:H] if self.single else there[..., :B]
        return torch.from_numpy(rows.copy()).permute(3, 0, 2, 1).flatten(-2)

    def _blocks(self, memory: np.ndarray, place: int, block: Tensor, read: bool = False) -> Tensor:
        """Write a block (B, H, p) into its place, sample by sample; or read what is there, in the block's shape."""
        B, H, p = block.shape
        size = self.units(H)
        for s in range(p):
            there = memory[place + s * size : place + (s + 1) * size]
            there = there.reshape(-1)[:H, None] if self.single else there[:, :B]
            if not read:
                there[:] = block[..., s].T.numpy()
            else:
                block = block.clone() if s == 0 else block
                block[..., s] = torch.from_numpy(there.T.copy())
        return block


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _width(tier: Tier) -> int:
    block = next(r.layer for r in tier.layers if isinstance(r.layer, S4Block))
    return len(block.s4.D)
