"""What is trained and evaluated: model and loss as one module, and what a batch's rows carry between segments.

What a row carries is a flat tuple of tensors, a row of each for a row of the batch, so that DDP and DeepSpeed pass it
on as they pass other inputs and outputs: the last level, which the next segment's first input is, and the model's state
between two pooled blocks. It has no gradient: back-propagation through time is truncated at a segment's beginning.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sashimi.errors import InputError
from sashimi.loss import nll
from sashimi.model import Sashimi, SashimiState, TierState
from sashimi.order import rank_positions
from sashimi.s4 import S4State
from sashimi.stream import Batch

Carried = tuple[Tensor, ...]

_PIECE = 1 << 15  # samples whose logits are held at once

_RESTART = "start another run from its weights with --init-from and a new --name"


class Objective(nn.Module):
    """Model and loss as one module: what DDP wraps returns one number, not (B, L, V) logits made float32."""

    def __init__(self, model: Sashimi, carry: bool = False) -> None:
        """`carry`: the model's state can be given and is returned; `beginning` is what a row that begins is given."""
        super().__init__()
        self.model = model
        self.beginning: Carried = ()
        if carry:
            with torch.no_grad():
                self.at_start = model.init_state(1).tier
            tensors = tuple(_tensors(self.at_start))
            self.beginning = (torch.full((1,), model.config.levels // 2, device=tensors[0].device), *tensors)

    def forward(self, inputs: Tensor, targets: Tensor, mask: Tensor, *carried: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The summed nats of the scored samples: inputs, targets (B, L) int64, mask (B, L) bool -> float64 scalar.

        With what the rows carry into the segment, for `inputs[:, 0]` and the model's state: nats, and what they carry
        out of it.
        """
        if not carried:
            return self._nats(self.model.features(inputs)[0], targets, mask)
        last, *tensors = carried
        inputs = torch.cat((last.unsqueeze(1), inputs[:, 1:]), dim=1)
        x, state = self.model.features(inputs, SashimiState(_with_tensors(self.at_start, iter(tensors)), 0))
        assert state is not None
        return self._nats(x, targets, mask), targets[:, -1], *(t.detach() for t in _tensors(state.tier))

    def _nats(self, x: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """The summed nats, of features x (B, L, H). The logits are made piece by piece, and anew for the gradient."""

        def of_piece(x: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
            return nll(self.model.read_out(x), targets, mask)[0]

        pieces = list(zip(*(t.flatten(0, 1).split(_PIECE) for t in (x, targets, mask)), strict=True))
        if len(pieces) == 1:
            return of_piece(*pieces[0])
        nats = [checkpoint(of_piece, *p, use_reentrant=False, preserve_rng_state=False) for p in pieces]
        return torch.stack(nats).sum()


class Rows:
    """The rows of one micro-batch, which play one segment after another."""

    def __init__(self, beginning: Carried) -> None:
        """`beginning`: what a row carries into a passage, see `Objective`; empty if nothing is carried."""
        self.beginning = self.carried = beginning

    def play(self, objective: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """The summed nats of the next segments."""
        batch = batch.to(device)
        mask = batch.mask
        if not self.beginning:
            return objective(batch.inputs, batch.targets, mask)
        carried = _where(batch.resets, self.beginning, self.carried)
        nats, *after = objective(batch.inputs, batch.targets, mask, *carried)
        # Nothing follows on the end of a recording, on damage or on filler; and what is not finite must not spread.
        goes_on = mask.all(dim=1)
        for tensor in after[1:]:
            goes_on = goes_on & tensor.isfinite().flatten(1).all(dim=1)
        self.carried = _where(goes_on, after, self.beginning)
        return nats


def join_rows(parts: Sequence[Carried], accumulation: int, world_size: int) -> dict[str, Tensor]:
    """What the rows of the global batch carry, in their order, from that of each rank's micro-batches, rank by rank."""
    micro_batch = len(parts[0][0])
    places = [rank_positions(0, micro_batch, accumulation, rank, world_size).ravel() for rank in range(world_size)]
    order = torch.from_numpy(np.argsort(np.concatenate(places)))
    return {f"{i:04d}": torch.cat(tensors)[order] for i, tensors in enumerate(zip(*parts, strict=True))}


def divide_rows(
    rows: Mapping[str, Tensor], beginning: Carried, micro_batch: int, accumulation: int, rank: int, world_size: int
) -> list[Carried]:
    """One rank's part of `join_rows`, for each of its micro-batches, whatever ranks have joined it.

    InputError if there are more or fewer rows, or if they are not of the form of `beginning`.
    """
    batch_size = micro_batch * accumulation * world_size
    tensors = [rows[name] for name in sorted(rows)]
    if [(t.shape[1:], t.dtype) for t in tensors] != [(t.shape[1:], t.dtype) for t in beginning]:
        raise InputError(f"carried.safetensors: does not fit the model; {_RESTART}")
    if {len(t) for t in tensors} != {batch_size}:
        raise InputError(
            f"train.batch_size={batch_size}: with data.carry it may not change, and the checkpoint to resume from has "
            f"{len(tensors[0])}; put that back, or {_RESTART}"
        )
    places = torch.from_numpy(rank_positions(0, micro_batch, accumulation, rank, world_size))
    return [tuple(t[place].to(start.device) for t, start in zip(tensors, beginning, strict=True)) for place in places]


def _tensors(state: TierState) -> Iterator[Tensor]:
    """The tensors of a state at phase 0; no sample of the block that then begins is pending."""
    yield from (layer.x for layer in (*state.down, *state.layers) if layer is not None)
    if state.pooled is not None:
        yield state.pooled.current
        yield from _tensors(state.pooled.tier)


def _with_tensors(state: TierState, tensors: Iterator[Tensor]) -> TierState:
    """The inverse of `_tensors`: a state of the form of `state`."""

    def renewed(layers: tuple[S4State | None, ...]) -> tuple[S4State | None, ...]:
        return tuple(layer and layer._replace(x=next(tensors)) for layer in layers)

    down, layers, pooled = renewed(state.down), renewed(state.layers), state.pooled
    if pooled is not None:
        pooled = pooled._replace(current=next(tensors), tier=_with_tensors(pooled.tier, tensors))
    return TierState(down, pooled, layers)


def _where(rows: Tensor, chosen: Sequence[Tensor], other: Sequence[Tensor]) -> Carried:
    """`chosen` in the rows that are True, `other` in the others: rows (B,) bool, tensors (B or 1, ...)."""
    return tuple(torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(chosen, other, strict=True))
