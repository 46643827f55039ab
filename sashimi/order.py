"""The data order: pure functions of (seed, position). No state, no files, no ranks of its own.

Training reads one endless sequence of segments, epoch after epoch, each epoch a fresh permutation of all of
them. Position p belongs to epoch p // n_segments, and which segment it holds is computed, never stored: a
keyed bijection in place of a shuffled list. So to resume at any position is to start counting there, and
ranks share the order by sharing its seed.

Where state is carried, a row of the batch plays some consecutive segments, a passage, before another one: `played_at`.
"""

from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sashimi.errors import InputError

UInt64s = NDArray[np.uint64]
Int64s = NDArray[np.int64]

ROUNDS = 12  # at 8, who follows whom is still visibly uneven over 100,000 epochs of 16 segments; at 12 not
SHUFFLE, CROP, RING = 0, 1, 2  # keep the draws for the order, the crops and the passages apart under one seed
FILLER = -1  # segment id of a row that is there only so that all ranks have equal batches


def segment_at(positions: ArrayLike, n_segments: int, seed: int) -> Int64s:
    """Segment ids in [0, n_segments) at these positions (any shape) of the endless training order.

    Over the positions of one epoch it is a permutation; another epoch or seed has another one. Memory is a
    few times that of `positions`, whatever n_segments is.

    The permutation is a generalized Feistel cipher on a square of ⌈√n⌉ × ⌈√n⌉ cells; a cell beyond
    n_segments is enciphered again until it falls inside, which keeps it a bijection (Black & Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002: the generalized-Feistel and cycle-walking ciphers).
    The square exceeds n by at most 2√n cells, so few positions walk.
    """
    positions = np.asarray(positions, dtype=np.int64)
    epochs, ids = np.divmod(positions.ravel(), n_segments)
    keys = keyed_hash(seed, SHUFFLE, epochs)
    side = isqrt(n_segments - 1) + 1
    outside = np.arange(ids.size)
    while outside.size:
        ids[outside] = _feistel(ids[outside], keys[outside], side)
        outside = outside[ids[outside] >= n_segments]
    return ids.reshape(positions.shape)


class Played(NamedTuple):
    """What is played at some positions: three arrays of their shape."""

    ids: Int64s
    """Segments; FILLER where a passage that is one segment shorter than others has ended."""
    epochs: Int64s
    begins: NDArray[np.bool_]
    """Whether a passage begins."""


def passages(n_segments: int, carry: int) -> tuple[int, int]:
    """Into how many passages of at most `carry` segments an epoch is cut, and how long the longest are.

    They are of equal length, or of two lengths that differ by one.
    """
    count = -(-n_segments // carry)
    return count, -(-n_segments // count)


def played_at(positions: ArrayLike, n_segments: int, seed: int, carry: int, batch_size: int) -> Played:
    """`segment_at` where each row of a batch of `batch_size` plays passages of up to `carry` consecutive segments.

    All rows begin a passage in the same step. The passages come in the order that `segment_at` gives them, the rows
    taking them in turn. In each epoch the segments, as a ring in their own order, are cut into `passages` anew, from a
    segment drawn from (seed, epoch) on; so each is played once, and after varying numbers of others.
    """
    positions = np.asarray(positions, dtype=np.int64)
    count, length = passages(n_segments, carry)
    steps, rows = np.divmod(positions, batch_size)
    slots, steps = steps // length * batch_size + rows, steps % length
    passage, epochs = segment_at(slots, count, seed), epoch_of(slots, count)
    first, last = (n_segments // count * p + np.minimum(p, n_segments % count) for p in (passage, passage + 1))
    turn = (keyed_hash(seed, RING, epochs) % np.uint64(n_segments)).astype(np.int64).reshape(positions.shape)
    ids = np.where(first + steps < last, (turn + first + steps) % n_segments, FILLER)
    return Played(ids, epochs, steps == 0)


def epoch_of(positions: ArrayLike, n_segments: int) -> Int64s:
    """Epoch, from 0, to which each position belongs; a batch may straddle two."""
    return np.asarray(positions, dtype=np.int64) // n_segments


def crop_offset(seed: int, epoch: ArrayLike, recording: ArrayLike, slack: ArrayLike) -> Int64s:
    """Samples, uniform in [0, slack], by which each recording's grid of segments is shifted in that epoch.

    `epoch`, `recording` and `slack` (samples) broadcast against each other.
    """
    draws = keyed_hash(seed, CROP, epoch, recording)
    return (draws % (np.asarray(slack, dtype=np.uint64) + np.uint64(1))).astype(np.int64)


def rank_positions(position: int, micro_batch: int, accumulation: int, rank: int, world_size: int) -> Int64s:
    """Positions (accumulation, micro_batch) that one rank reads of the global batch starting at `position`.

    Micro-step a of all ranks together is one contiguous run of world_size × micro_batch positions, of which
    rank r has the r-th part; the global batch is the same set of positions for every world size.
    """
    steps = position + np.arange(accumulation, dtype=np.int64) * (world_size * micro_batch)
    return steps[:, None] + rank * micro_batch + np.arange(micro_batch, dtype=np.int64)


def accumulation_steps(batch_size: int, micro_batch: int | None, world_size: int) -> int:
    """Micro-steps per step, such that batch_size = world_size × micro_batch × accumulation exactly.

    `batch_size` is the global batch in segments. With `micro_batch` None or 0 each rank takes its whole
    share, batch_size / world_size, at once. Raises InputError, which names valid values, where it does not
    divide.
    """
    micro_batch = micro_batch or 0
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1; try {world_size * max(micro_batch, 1)}")
    if micro_batch < 0:
        raise InputError(f"micro_batch={micro_batch}: give 1 or more, or 0 for batch_size / world_size")
    if batch_size % (world_size * max(micro_batch, 1)):
        raise InputError(_why_indivisible(batch_size, micro_batch, world_size))
    return batch_size // (world_size * micro_batch) if micro_batch else 1


def _why_indivisible(batch_size: int, micro_batch: int, world_size: int) -> str:
    """The message of `accumulation_steps`: what does not divide, and which values would."""
    unit = world_size * max(micro_batch, 1)
    factors = f"world_size {world_size}" + (f" × micro_batch {micro_batch}" if micro_batch else "")
    below = batch_size // unit * unit
    sizes = f"{below} or {below + unit}" if below else f"{unit}"
    message = f"batch_size={batch_size}: must be a multiple of {factors}; set batch_size to {sizes}"
    per_rank, rest = divmod(batch_size, world_size)
    if rest:
        return f"{message}, or run a number of ranks that divides {batch_size}"
    fits = ", ".join(str(size) for size in range(1, per_rank + 1) if per_rank % size == 0)
    return f"{message}, or micro_batch to one of {fits}"


def keyed_hash(*words: ArrayLike) -> UInt64s:
    """64-bit hash of integer words, taken modulo 2**64 and broadcast against each other: (at least 1-d).

    One word gives the first output of the SplitMix64 generator seeded with it; further words are chained.
    Unsigned 64-bit arithmetic alone, so it is the same on every platform and with every numpy.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        bits = np.uint64(word % 2**64) if isinstance(word, int) else np.asarray(word).astype(np.uint64)
        state = _splitmix64(state ^ bits)
    return state


def _splitmix64(state: UInt64s) -> UInt64s:
    """SplitMix64: add the golden gamma, then mix (Steele, Lea & Flood, OOPSLA 2014; Vigna's splitmix64.c)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _feistel(ids: Int64s, keys: UInt64s, side: int) -> Int64s:
    """A bijection of [0, side²) for each key: ids (P,), keys (P,) -> (P,).

    Each round adds a hash of one coordinate to the other and swaps them; undone by subtracting it again.
    """
    left, right = np.divmod(ids.astype(np.uint64), np.uint64(side))
    for index in range(ROUNDS):
        word = keyed_hash(keys ^ (right * np.uint64(ROUNDS) + np.uint64(index)))
        left, right = right, (left + word % np.uint64(side)) % np.uint64(side)
    return (left * np.uint64(side) + right).astype(np.int64)
