"""The order's part of laws 7, 8 and 9: pure functions of (seed, position)."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sashimi.errors import InputError
from sashimi.order import (
    FILLER,
    Played,
    accumulation_steps,
    crop_offset,
    epoch_of,
    keyed_hash,
    passages,
    played_at,
    rank_positions,
    segment_at,
)

FAR = 10**12  # a position that no training run reaches


def epochs_of(n_segments: int, n_epochs: int, seed: int, start: int = 0) -> np.ndarray:
    """The first `n_epochs` epochs from position `start` on, (n_epochs, n_segments)."""
    positions = start + np.arange(n_epochs * n_segments)
    return segment_at(positions, n_segments, seed).reshape(n_epochs, n_segments)


def excess(counts: np.ndarray, expected: np.ndarray | float, freedom: int) -> float:
    """Pearson's chi-square of counts, in standard deviations above its mean."""
    chi_square = float(np.sum((counts - expected) ** 2 / expected))
    return (chi_square - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 10, 97, 256, 1000, 10_007, 200_000])
@pytest.mark.parametrize("start_epoch", [0, 1, FAR])
def test_law_8_each_epoch_holds_each_segment_once(n: int, start_epoch: int) -> None:
    """Mutation: in `segment_at`, replace `while outside.size` by one pass (`if`), so ids ≥ n remain; or in
    `_feistel`, drop `left, ` from the swap, so two ids share a cell."""
    for ids in epochs_of(n, 3, seed=5, start=start_epoch * n):
        assert np.array_equal(np.sort(ids), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 500), epoch=st.integers(0, 2**40), seed=st.integers(-(2**70), 2**70))
def test_law_8_holds_for_any_size_epoch_and_seed(n: int, epoch: int, seed: int) -> None:
    """Mutation: in `segment_at`, `isqrt(n_segments)` for `isqrt(n_segments - 1) + 1`: the square is too small."""
    assert np.array_equal(np.sort(epochs_of(n, 1, seed, start=epoch * n)[0]), np.arange(n))


def test_law_7_every_epoch_and_every_seed_has_its_own_permutation() -> None:
    """Mutation: in `segment_at`, `0 * epochs` for `epochs` in the key."""
    orders = [order for seed in range(20) for order in epochs_of(50, 20, seed)]
    assert len({order.tobytes() for order in orders}) == 400


def test_law_7_the_order_is_a_function_of_the_position_alone() -> None:
    """Mutation: in `segment_at`, count from the first one: `positions.ravel() - positions.flat[0]`."""
    whole = segment_at(np.arange(1000), 37, seed=1)
    one_by_one = [int(segment_at(position, 37, seed=1)) for position in range(1000)]
    assert whole.tolist() == one_by_one
    assert np.array_equal(segment_at(np.arange(1000).reshape(8, 125), 37, 1), whole.reshape(8, 125))
    assert epoch_of([0, 36, 37, 37 * FAR + 36], 37).tolist() == [0, 0, 1, FAR]


def test_law_7_the_order_never_changes_between_versions() -> None:
    """A run resumed by another version must go on in the same order. First outputs of SplitMix64 as published
    (seed 1234567: the test vector of its ports; seed 0: 0xe220a8397b1dcdaf). Mutation: any other constant."""
    assert keyed_hash(1234567).tolist() == [6457827717110365317]
    assert keyed_hash(0).tolist() == [0xE220A8397B1DCDAF]
    assert segment_at(np.arange(12), 5, seed=0).tolist() == [4, 1, 3, 0, 2, 0, 1, 3, 2, 4, 2, 1]
    assert segment_at([0, 10**7, FAR], 10**7, seed=0).tolist() == [3959905, 4657736, 3625732]
    assert crop_offset(0, [0, 1], [[0], [7]], 10**6).tolist() == [[432158, 365407], [764076, 537736]]


def hash_in_plain_integers(*words: int) -> int:
    """`keyed_hash` again, without numpy."""
    state = 0
    for word in words:
        state = ((state ^ word % 2**64) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


def segment_in_plain_integers(position: int, n_segments: int, seed: int) -> int:
    """`segment_at` again, for one position and without numpy."""
    epoch, cell = divmod(position, n_segments)
    side = next(side for side in itertools.count(1) if side**2 >= n_segments)
    key = hash_in_plain_integers(seed, 0, epoch)
    while True:
        left, right = divmod(cell, side)
        for index in range(12):
            left, right = right, (left + hash_in_plain_integers(key ^ (right * 12 + index))) % side
        cell = left * side + right
        if cell < n_segments:
            return cell


@given(position=st.integers(0, FAR), n=st.integers(1, 10**6), seed=st.integers(-(2**70), 2**70))
def test_law_7_the_order_equals_its_slow_definition(position: int, n: int, seed: int) -> None:
    """Mutation: in `_feistel`, use the same hash in every round: `keys ^ right`."""
    assert segment_at(position, n, seed) == segment_in_plain_integers(position, n, seed)


@pytest.mark.parametrize("n", [2, 3, 9, 16, 100])
def test_shuffle_any_segment_comes_anywhere_and_follows_any_other(n: int) -> None:
    """Chi-square over many epochs of (place, id), and of the step from one id to the next.

    Mutation: ROUNDS = 4.
    """
    epochs = epochs_of(n, 2_000_000 // n, seed=11)
    counts = np.stack([np.bincount(epochs[:, place], minlength=n) for place in range(n)])
    assert excess(counts, len(epochs) / n, (n - 1) ** 2) < 5
    steps = np.bincount(((epochs[:, 1:] - epochs[:, :-1]) % n).ravel(), minlength=n)[1:]
    assert n == 2 or excess(steps, steps.sum() / (n - 1), n - 2) < 5


def test_shuffle_all_orders_of_three_are_equally_frequent() -> None:
    """Mutation: ROUNDS = 4."""
    epochs = epochs_of(3, 100_000, seed=2)
    orders = [np.sum((epochs == order).all(axis=1)) for order in itertools.permutations(range(3))]
    assert excess(np.array(orders), len(epochs) / 6, 5) < 5


def test_shuffle_a_large_epoch_has_no_visible_structure() -> None:
    """Neighbours in the corpus end up anywhere: no correlation of ids along the order, nor at a lag of √n.

    Mutation: ROUNDS = 1.
    """
    n = 250_000
    ids = epochs_of(n, 1, seed=3)[0].astype(np.float64)
    for lag in (1, 2, 500, 501):
        assert abs(np.corrcoef(ids[lag:], ids[:-lag])[0, 1]) < 5 / np.sqrt(n)


def test_memory_does_not_grow_with_the_corpus() -> None:
    """Mutation: in `segment_at`, look the ids up in a stored `np.arange(n_segments)`."""
    peaks = []
    for n in (10**3, 10**7):
        tracemalloc.start()
        segment_at(np.arange(1000), n, seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_crop_offsets_fill_their_range_and_vary_with_seed_epoch_and_recording() -> None:
    """Mutation: in `crop_offset`, drop the `+ np.uint64(1)`; or hash `0 * epoch`, or a seed of 0."""
    epochs, recordings = np.arange(300)[:, None], np.arange(200)
    offsets = crop_offset(4, epochs, recordings, 9)
    counts = np.bincount(offsets.ravel(), minlength=10)
    assert counts.size == 10
    assert excess(counts, 6000, 9) < 5
    for axis in (0, 1):
        repeats = np.sum(np.diff(offsets, axis=axis) == 0)
        assert abs(repeats - 6000) < 5 * np.sqrt(6000)
    assert np.mean(crop_offset(5, epochs, recordings, 9) == offsets) < 0.12
    assert not crop_offset(4, epochs, recordings, 0).any()


@given(
    position=st.integers(0, FAR),
    micro_batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 5),
)
def test_law_7_ranks_and_micro_steps_divide_the_global_batch(
    position: int, micro_batch: int, accumulation: int, world_size: int
) -> None:
    """Mutation: in `rank_positions`, start at `rank * micro_batch * accumulation`."""
    parts = [rank_positions(position, micro_batch, accumulation, rank, world_size) for rank in range(world_size)]
    steps = np.concatenate(parts, axis=1)  # micro-step a of all ranks is one contiguous run
    size = world_size * micro_batch * accumulation
    assert steps.ravel().tolist() == list(range(position, position + size))


def test_law_7_the_batch_size_is_exact_or_refused() -> None:
    """Mutation: in `accumulation_steps`, drop the check of the remainder."""
    for batch_size, micro_batch, world_size in itertools.product(range(1, 25), range(1, 9), range(1, 5)):
        if batch_size % (micro_batch * world_size) == 0:
            steps = accumulation_steps(batch_size, micro_batch, world_size)
            assert steps * micro_batch * world_size == batch_size
        else:
            with pytest.raises(InputError, match=f"batch_size={batch_size}: must be a multiple"):
                accumulation_steps(batch_size, micro_batch, world_size)
    assert accumulation_steps(32, None, 4) == accumulation_steps(32, 0, 2) == 1


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ((32, 0, 3), "set batch_size to 30 or 33, or run a number of ranks that divides 32"),
        ((32, 5, 2), "set batch_size to 30 or 40, or micro_batch to one of 1, 2, 4, 8, 16"),
        ((8, 64, 1), "set batch_size to 64, or micro_batch to one of 1, 2, 4, 8"),
        ((0, 4, 2), "must be at least 1; try 8"),
        ((8, -1, 2), "micro_batch=-1: give 1 or more"),
    ],
)
def test_a_refusal_names_values_that_are_valid(arguments: tuple[int, int, int], remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        accumulation_steps(*arguments)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- passages


def played(n: int, carry: int, batch_size: int, n_epochs: int, seed: int = 4) -> Played:
    """At all positions that hold the first epochs, as arrays (steps, rows)."""
    count, length = passages(n, carry)
    steps = -(-n_epochs * count // batch_size) * length
    return played_at(np.arange(steps * batch_size).reshape(steps, batch_size), n, seed, carry, batch_size)


SHAPES = [(1, 2, 3), (2, 2, 1), (10, 3, 1), (10, 3, 4), (23, 5, 8), (97, 2, 6), (100, 10, 3), (100, 7, 16), (7, 50, 2)]


@pytest.mark.parametrize(("n", "carry", "batch_size"), SHAPES)
def test_law_8_passages_hold_each_segment_once(n: int, carry: int, batch_size: int) -> None:
    """And filler in at most one place of each. Mutation: in `played_at`, `min(p, n % count)` dropped; or `<=` last."""
    at = played(n, carry, batch_size, n_epochs=3)
    for epoch in range(3):
        ids = at.ids[at.epochs == epoch]
        assert np.array_equal(np.sort(ids[ids != FILLER]), np.arange(n))
        assert np.sum(ids == FILLER) <= passages(n, carry)[0]
        assert ids.size == np.prod(passages(n, carry))


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 300),
    carry=st.integers(2, 40),
    batch_size=st.integers(1, 20),
    start=st.integers(0, 2**40),
    seed=st.integers(0, 2**63 - 1),
)
def test_rows_play_consecutive_segments(n: int, carry: int, batch_size: int, start: int, seed: int) -> None:
    """From one step to the next a row goes on to the segment that follows, or begins a passage. No passage is longer
    than `carry`, and none shorter by more than one than another.

    Mutation: in `played_at`, `% count` for `% length`.
    """
    count, length = passages(n, carry)
    assert length <= carry
    assert (count - 1) * carry < n <= count * length
    at = played_at(
        start * batch_size + np.arange(3 * length * batch_size).reshape(-1, batch_size), n, seed, carry, batch_size
    )
    before, after = at.ids[:-1], at.ids[1:]
    assert np.all((after == (before + 1) % n) | at.begins[1:] | (after == FILLER))
    assert not np.any(at.begins & (at.ids == FILLER))
    assert not np.any((before == FILLER) & ~at.begins[1:])
    assert np.all((at.epochs[1:] == at.epochs[:-1]) | at.begins[1:])
    assert np.all(at.begins.sum(axis=0) == 3)


def test_passages_are_cut_and_ordered_anew() -> None:
    """In each epoch and with each seed they begin elsewhere, anywhere, and come in another order.

    Mutations: in `played_at`, `turn` of epoch 0; or `passage` = `slots % count`.
    """
    n, carry = 50, 5
    firsts = []
    for seed in range(2):
        at = played(n, carry, 1, n_epochs=1000, seed=seed)
        firsts.append(at.ids[at.begins].reshape(1000, 10))
        counts = np.bincount(firsts[-1].ravel(), minlength=n)
        assert excess(counts, 200, n - 1) < 5
        assert len({tuple(row) for row in ((firsts[-1] - firsts[-1][:, :1]) % n).tolist()}) > 950
    assert np.mean(firsts[0] == firsts[1]) < 0.1


def test_passages_never_change_between_versions() -> None:
    """A run resumed by another version must go on in the same order. Mutation: RING = 3."""
    at = played_at(np.arange(24).reshape(-1, 4), 10, 0, 3, 4)
    assert at.ids.T.tolist() == [[2, 3, 4, 1, 2, -1], [9, 0, 1, 8, 9, 0], [7, 8, -1, 5, 6, 7], [5, 6, -1, 3, 4, -1]]
