"""Laws 7, 8 and 9 on real shards: which segments are read, on which rank, and what is in them."""

import itertools
import pickle
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sashimi.audio import AudioConfig, Quantizer
from sashimi.errors import InputError
from sashimi.grid import Grid
from sashimi.order import FILLER, played_at, segment_at
from sashimi.shard_writer import write_split
from sashimi.shards import INDEX_DTYPE
from sashimi.split import Split, open_split
from sashimi.stream import (
    Batch,
    DataConfig,
    Place,
    Segments,
    describe_segments,
    eval_batches,
    n_segments,
    train_batches,
)

L = 256  # samples of a segment
LENGTHS = [100, 256, 1000, 2304, 255, 513, 1, 4000, 700, 257]  # of the recordings, in samples
AUDIO = AudioConfig(sample_rate=8000, quantizer="linear", bits=16)  # level = sample + 32768, exactly
DATA = DataConfig(segment=L, workers=0)
SEED = 3


@pytest.fixture(scope="module")
def recordings() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0)
    return {
        f"{number:06d}_noise": noise.integers(-30000, 30000, length).astype(np.int16)
        for number, length in enumerate(LENGTHS)
    }


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, recordings: dict[str, np.ndarray]) -> Split:
    """Several shards, and several chunks a recording, at lengths that no segment divides."""
    folder = tmp_path_factory.mktemp("shards") / "noise"
    return write_split(folder, "train", recordings, 8000, chunk_samples=600, shard_recordings=3)


def in_position_order(streams: list[Iterable[Batch]], n_micro_steps: int) -> Batch:
    """The first `n_micro_steps` of all ranks as one Batch, its rows in the order of their positions."""
    micro_steps = zip(*(itertools.islice(stream, n_micro_steps) for stream in streams), strict=True)
    batches = list(itertools.chain.from_iterable(micro_steps))
    tensors = (torch.cat(field) for field in zip(*(batch[:4] for batch in batches), strict=True))
    return Batch(*tensors, batches[0].silence, tuple(fault for batch in batches for fault in batch.faults))


def global_batches(
    split: Split, data: DataConfig, position: int, batch_size: int, micro_batch: int, world_size: int, n: int
) -> Batch:
    """The next `n` global batches, put together from all ranks."""
    streams = [
        train_batches(split, data, AUDIO, SEED, position, batch_size, micro_batch, Place(rank, world_size))
        for rank in range(world_size)
    ]
    return in_position_order(streams, n * batch_size // (micro_batch * world_size))


def assert_equal(a: Batch, b: Batch) -> None:
    for name, x, y in zip(Batch._fields[:4], a, b, strict=False):
        assert torch.equal(x, y), name
    assert a[4:] == b[4:]


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers"),
    [(1, 8, 1), (1, 2, 3), (2, 4, 0), (2, 2, 1), (4, 2, 0), (4, 1, 0), (2, 1, 3)],
)
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_law_7_ranks_and_workers_train_on_the_same_batches(
    split: Split, world_size: int, micro_batch: int, workers: int, crop: bool
) -> None:
    """Mutation: in `train_batches`, pass `0` for `rank` to `rank_positions`; or `accumulation` for `micro_batch`."""
    data = replace(DATA, crop=crop)
    one = global_batches(split, data, position=0, batch_size=8, micro_batch=8, world_size=1, n=6)
    data = replace(data, workers=workers)
    many = global_batches(split, data, 0, 8, micro_batch, world_size, n=6)
    assert_equal(one, many)


@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize("batch_size", [8, 10])
def test_law_8_each_epoch_holds_each_segment_once(split: Split, tail: str, batch_size: int) -> None:
    """Batches straddle epochs, since none of these sizes divides an epoch. Mutation: in `train_batches`, advance
    `start` by `batch_size + 1`."""
    data = replace(DATA, tail=tail)
    n = n_segments(split, data)
    assert n % batch_size
    seen = global_batches(split, data, 0, batch_size, batch_size // 2, 2, n=-(-3 * n // batch_size))
    for epoch in range(3):
        ids = seen.segment_ids[epoch * n : (epoch + 1) * n]
        assert sorted(ids.tolist()) == list(range(n))


@pytest.mark.parametrize("position", [5, 10_000_003])
@pytest.mark.parametrize("workers", [0, 2])
def test_law_9_to_resume_is_to_start_at_the_position(split: Split, position: int, workers: int) -> None:
    """Stopped after 3 steps on one rank, when workers had read ahead; resumed on two ranks.

    Mutation: in `train_batches`, start at `position // batch_size * batch_size`.
    """
    data = replace(DATA, crop=True, workers=workers)
    unbroken = global_batches(split, data, position, batch_size=6, micro_batch=6, world_size=1, n=7)
    before = global_batches(split, data, position, 6, 6, 1, n=3)
    after = global_batches(split, data, position + 18, 6, 3, 2, n=4)
    assert_equal(unbroken, in_position_order([[before, after]], 2))
    expected = segment_at(position + np.arange(42), n_segments(split, data), SEED)
    assert unbroken.segment_ids.tolist() == expected.tolist()


def test_law_8_counts_of_segments(split: Split) -> None:
    """Mutation: in `Grid._counts`, `stop // L` for `(stop + L - 1) // L`; or drop `short`."""
    per_recording = {"drop": [1, 1, 3, 9, 1, 2, 1, 15, 2, 1], "pad": [1, 1, 4, 9, 1, 3, 1, 16, 3, 2]}
    for tail, counts in per_recording.items():
        grid = Grid(split.index, L, tail)
        assert np.bincount(grid.cut(np.arange(grid.n_segments)).recordings).tolist() == counts
        assert grid.n_segments == sum(counts)


def index_of(lengths: Sequence[int], chunk: int) -> np.ndarray:
    """An index of recordings of these lengths in chunks of `chunk` samples."""
    rows = [(r, start, min(chunk, n - start)) for r, n in enumerate(lengths) for start in range(0, n, chunk)]
    index = np.zeros(len(rows), INDEX_DTYPE)
    for name, values in zip(("recording", "start", "samples"), zip(*rows, strict=True), strict=True):
        index[name] = values
    return index


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 2000)), min_size=1, max_size=100),
    segment=st.integers(1, 90),
    chunk=st.integers(1, 90),
    tail=st.sampled_from(["drop", "pad"]),
)
def test_law_8_each_segment_lies_where_a_table_of_all_recordings_puts_it(
    lengths: list[int], segment: int, chunk: int, tail: str
) -> None:
    """Over many blocks of the index, within which recordings begin, go on and end.

    Mutations: in `Grid.cut`, `side="left"`, or no step back to the row where segments begin; in `Grid._counts`, drop
    `short`, or `before = stop // L - 1`; in `first_rows`, start with `high` one less.
    """
    index = index_of(lengths, chunk)
    grid = Grid(index, segment, tail)
    counts = np.array([max(1, n // segment) if tail == "drop" else -(-n // segment) for n in lengths])
    first = np.concatenate([[0], counts.cumsum()])
    assert grid.n_segments == first[-1]
    ids = np.random.default_rng(len(lengths)).permutation(first[-1])[:500]
    recordings = np.repeat(np.arange(len(lengths)), counts)[ids]
    starts = (ids - first[recordings]) * segment
    cuts = grid.cut(ids)
    assert np.array_equal(cuts.recordings, recordings)
    assert np.array_equal(cuts.starts, starts)
    assert np.array_equal(cuts.lengths, np.array(lengths)[recordings])
    assert np.array_equal(cuts.samples, np.minimum(segment, cuts.lengths - starts))
    rows = index[cuts.rows]
    assert np.array_equal(rows["recording"], recordings)
    assert np.array_equal(rows["start"], starts // chunk * chunk)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    segment=st.integers(1, 20),
    chunk=st.integers(1, 30),
    tail=st.sampled_from(["drop", "pad"]),
    epoch=st.integers(0, 10**9),
)
def test_law_8_crops_keep_the_count_and_stay_inside(
    lengths: list[int], segment: int, chunk: int, tail: str, epoch: int
) -> None:
    """Segments of an epoch lie end to end from one offset in [0, M mod L], whole but for the last one of `pad`.

    Mutation: in `Grid.crop`, `slack = rest + 1`; or drop the line for recordings shorter than a segment.
    """
    grid = Grid(index_of(lengths, chunk), segment, tail)
    ids = np.arange(grid.n_segments)
    cuts = grid.crop(grid.cut(ids), SEED, np.full(ids.shape, epoch))
    for recording, length in enumerate(lengths):
        mine = cuts.recordings == recording
        starts, samples = cuts.starts[mine], cuts.samples[mine]
        count = max(1, length // segment) if tail == "drop" else -(-length // segment)
        assert len(starts) == count
        assert 0 <= starts[0] <= (length % segment if length >= segment else 0)
        assert np.array_equal(np.diff(starts), samples[:-1])
        assert np.all(samples[:-1] == segment)
        assert samples[-1] == (min(segment, length - starts[-1]) if tail == "pad" else min(segment, length))
        assert samples[-1] > 0
        assert starts[-1] + samples[-1] <= length


def test_law_8_crops_are_drawn_anew_for_each_epoch_and_recording(split: Split) -> None:
    """Mutation: in `Segments.locate`, give `Grid.crop` epochs of 0."""
    segments = Segments(split, replace(DATA, tail="drop", crop=True), AUDIO, SEED)
    n = segments.grid.n_segments
    offsets: dict[int, set[int]] = {}
    for epoch in range(40):
        _, cuts, _ = segments.locate(np.arange(epoch * n, (epoch + 1) * n))
        for recording, start in zip(cuts.recordings, cuts.starts % L, strict=True):
            offsets.setdefault(int(recording), set()).add(int(start))
    rest = [length % L if length > L else 0 for length in LENGTHS]
    assert all(len(offsets[r]) > 10 for r in range(len(LENGTHS)) if rest[r] > 100)
    assert all(offsets[r] == {0} for r in range(len(LENGTHS)) if rest[r] == 0)


@pytest.mark.parametrize("crop", [False, True])
def test_segments_are_the_signal_cut_from_the_source(
    split: Split, recordings: dict[str, np.ndarray], crop: bool
) -> None:
    """Across chunks and shards, sample for sample; the input is the target one sample later.

    Mutation: in `Segments`, quantize into `levels[row, -len(sound):]`; in `Batch.inputs`, pad with 0.
    """
    data = replace(DATA, crop=crop)
    n = n_segments(split, data)
    sources = list(recordings.values())
    segments = Segments(split, data, AUDIO, SEED)
    batch = segments[np.arange(2 * n)]
    _, cuts, _ = segments.locate(np.arange(2 * n))
    crossing = 0
    for row in range(2 * n):
        recording, start, samples = (int(field[row]) for field in cuts[:3])
        crossing += start // 600 < (start + samples - 1) // 600
        source = torch.from_numpy(sources[recording][start : start + samples].astype(np.int64)) + 32768
        padding = torch.full((L - samples,), 32768)
        assert torch.equal(batch.targets[row], torch.cat([source, padding]))
        assert batch.mask[row].tolist() == [True] * samples + [False] * (L - samples)
    assert crossing > 5
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert torch.all(batch.inputs[:, 0] == 32768)
    assert batch.faults == ()


def test_a_whole_epoch_scores_each_sample_once(split: Split) -> None:
    """With `pad` and no crop nothing is left out. Mutation: in `Batch.mask`, `<=`."""
    batch = Segments(split, DATA, AUDIO, SEED)[np.arange(n_segments(split, DATA))]
    assert int(batch.mask.sum()) == sum(LENGTHS)


@pytest.mark.parametrize("quantizer", ["mu-law", "mu-law-minmax", "linear-minmax"])
def test_short_segments_are_quantized_before_they_are_padded(tmp_path: Path, quantizer: str) -> None:
    """The samples are all positive, so zeros beside them would change what min-max makes of them.

    Mutation: in `Segments`, encode a row of L samples that holds zeros where the recording has ended.
    """
    samples = np.random.default_rng(1).integers(5000, 9000, 100).astype(np.int16)
    audio = AudioConfig(sample_rate=8000, quantizer=quantizer)
    batch = Segments(write_split(tmp_path, "train", {"0": samples}, 8000), DATA, audio, seed=None)[np.array([0])]
    assert torch.equal(batch.targets[0, :100], Quantizer(audio).encode(torch.from_numpy(samples) / 32768))
    assert torch.all(batch.targets[0, 100:] == 128)
    assert batch.inputs[0, 0] == 128


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_law_8_evaluation_uses_each_segment_once_on_any_number_of_ranks(
    split: Split, world_size: int, workers: int
) -> None:
    """Mutation: in `eval_batches`, drop the line that sets FILLER; or round `n_batches` down."""
    data = replace(DATA, workers=workers, crop=True)
    loaders = [eval_batches(split, data, AUDIO, 4, Place(rank, world_size)) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    for _ in range(2):  # a second evaluation, by the same loaders
        everything = in_position_order(loaders, len(loaders[0]))
        filler = everything.segment_ids == FILLER
        n = n_segments(split, data)
        assert Counter(everything.segment_ids[~filler].tolist()) == Counter(range(n))
        assert not everything.mask[filler].any()
        assert int(everything.mask.sum()) == sum(LENGTHS)
        assert len(filler) < n + 4 * world_size


def damage(split: Split, folder: Path, recording: int) -> Split:
    """A copy of the shards with some bytes of a recording's first chunk overwritten, and nothing else."""
    shutil.copytree(split.folder, folder)
    row = split.rows(recording)[0]
    with open(folder / split.shard_names[row["shard"]], "r+b") as tar:
        tar.seek(int(row["offset"]) + int(row["bytes"]) // 2)
        tar.write(b"\xaa" * 20)
    return open_split(folder, split.name)


@pytest.mark.parametrize("workers", [0, 2])
def test_law_8_a_damaged_segment_is_masked_and_named_and_leaves_the_others_alone(
    split: Split, tmp_path: Path, workers: int
) -> None:
    """Mutation: in `Segments`, leave the loop (`break`) at a DamagedMember instead of going on."""
    data = replace(DATA, workers=workers)
    n = n_segments(split, data)
    damaged = damage(split, tmp_path / "noise", recording=3)
    whole = global_batches(split, data, 0, n, n, 1, n=1)
    holed = global_batches(damaged, data, 0, n, n, 1, n=1)
    assert torch.equal(whole.segment_ids, holed.segment_ids)
    hit = ~holed.mask.any(dim=1)
    assert torch.all(holed.targets[hit] == 32768)
    assert set(holed.segment_ids[hit].tolist()) == {6, 7, 8}  # those that need the first 600 samples
    for name, a, b in zip(Batch._fields[:4], whole, holed, strict=False):
        assert torch.equal(a[~hit], b[~hit]), name
    assert len(holed.faults) == 3
    fault = next(fault for fault in holed.faults if "segment 7" in fault)
    assert str(tmp_path / "noise" / "train-000001.tar") in fault
    assert "000003_noise-00000.flac" in fault
    assert "recording 000003_noise, samples 256..512" in fault


def test_a_missing_shard_is_a_fault_of_its_segments_alone(split: Split, tmp_path: Path) -> None:
    """Lost after the split was opened. Mutation: in `Segments`, catch nothing."""
    shutil.copytree(split.folder, tmp_path / "noise")
    opened = open_split(tmp_path / "noise", "train")
    (tmp_path / "noise" / "train-000000.tar").unlink()
    batch = Segments(opened, DATA, AUDIO, seed=None)[np.arange(10)]
    assert (~batch.mask.any(dim=1)).tolist() == [True] * 6 + [False] * 4
    assert len(batch.faults) == 6
    assert "recording number 0, samples" in batch.faults[0]


def test_segments_are_described_by_recording_and_samples(split: Split) -> None:
    """Mutation: in `Grid.cut`, `side="left"`; in `describe_segments`, `np.array(segment_ids)` without a type."""
    assert describe_segments(split, DATA, [5, 0, 6]) == [
        "recording 000002_noise, samples 768..1000",
        "recording 000000_noise, samples 0..100",
        "recording 000003_noise, samples 0..256",
    ]
    assert describe_segments(split, DATA, []) == []


def test_streams_leave_the_callers_random_state_alone(split: Split) -> None:
    """Dropout after a resume must not depend on how many loaders were opened. Mutation: in `_loader`, drop
    `generator`."""
    before = torch.get_rng_state()
    next(train_batches(split, DATA, AUDIO, SEED, 0, 4, 4))
    next(iter(eval_batches(split, DATA, AUDIO, 4)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_are_the_same_batches(split: Split, workers: int) -> None:
    """Mutation: in `_loader`, drop `pin_memory`."""
    data = replace(DATA, workers=workers)
    plain = next(train_batches(split, data, AUDIO, SEED, 0, 8, 8))
    pinned = next(train_batches(split, data, AUDIO, SEED, 0, 8, 8, Place(pin_memory=True)))
    assert pinned.levels.is_pinned()
    assert pinned.samples.is_pinned()
    assert_equal(plain, pinned)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shards": ""}, "data.shards='': name a folder"),
        ({"segment": 0}, "data.segment=0: give 1 to 2"),
        ({"tail": "cut"}, "data.tail='cut': choose drop or pad"),
        ({"workers": -1}, "data.workers=-1: give 0 to 256"),
        ({"prefetch": 0}, "data.prefetch=0: give 1 to 1000"),
        ({"on_damage": "skip"}, "data.on_damage='skip': choose mask or fatal"),
    ],
)
def test_wrong_settings_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(DATA, **fields)


def test_wrong_use_is_refused_by_name(split: Split) -> None:
    with pytest.raises(
        InputError,
        match=r"audio.sample_rate=16000: .* packed at 8000 Hz; pack it again with --sample-rate 16000, or",
    ):
        Segments(split, DATA, AudioConfig(), SEED)
    with pytest.raises(InputError, match="batch_size=5: must be a multiple of world_size 2"):
        train_batches(split, DATA, AUDIO, SEED, 0, 5, None, Place(0, 2))
    with pytest.raises(InputError, match="batch_size=0: give 1 to"):
        eval_batches(split, DATA, AUDIO, 0)


# ---- state carried from segment to segment


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("crop", [False, True])
def test_law_7_ranks_play_the_same_passages(split: Split, world_size: int, micro_batch: int, crop: bool) -> None:
    """And from any step on. Mutation: in `train_batches`, Segments without `batch_size`."""
    data = replace(DATA, crop=crop, carry=3)
    one = global_batches(split, data, position=16, batch_size=8, micro_batch=8, world_size=1, n=7)
    assert_equal(one, global_batches(split, data, 16, 8, micro_batch, world_size, n=7))
    expected = played_at(16 + np.arange(56), n_segments(split, data), SEED, carry=3, batch_size=8)
    assert one.segment_ids.tolist() == expected.ids.tolist()


@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize("crop", [False, True])
def test_a_row_goes_on_where_it_was(split: Split, recordings: dict[str, np.ndarray], tail: str, crop: bool) -> None:
    """Where a row does not reset, its samples follow in the recording on those of its batch before; it resets at a
    recording's first segment and at the beginning of a passage. Each epoch scores what it does without passages.

    Mutations: in `Segments.locate`, `begins` without those of recordings, or epochs of 0; in `Grid.crop`, samples
    of filler.
    """
    data = replace(DATA, tail=tail, crop=crop, carry=4)
    steps, rows = 120, 3
    segments = Segments(split, data, AUDIO, SEED, batch_size=rows)
    positions = np.arange(steps * rows).reshape(steps, rows)
    played = [segments[step] for step in positions]
    _, cuts, begins = segments.locate(positions)
    first, went_on = set(segments.grid.firsts().tolist()), 0
    for step, row in itertools.product(range(1, steps), range(rows)):
        batch, samples = played[step], int(cuts.samples[step, row])
        segment, filler = int(batch.segment_ids[row]), samples == 0
        assert bool(batch.resets[row]) == (bool(begins[step, row]) or segment in first)
        assert filler == (segment == FILLER)
        assert int(batch.mask[row].sum()) == samples
        if not batch.resets[row] and not filler:
            assert cuts.recordings[step, row] == cuts.recordings[step - 1, row]
            assert cuts.starts[step, row] == cuts.starts[step - 1, row] + L
            source = list(recordings.values())[cuts.recordings[step, row]].astype(np.int64) + 32768
            start = cuts.starts[step, row]
            both = torch.cat((played[step - 1].targets[row], batch.targets[row, :samples]))
            assert torch.equal(both, torch.from_numpy(source[start - L : start + samples]))
            went_on += 1
    assert went_on > steps


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_law_8_evaluation_plays_recordings_as_a_whole(split: Split, world_size: int, rows: int) -> None:
    """Each once on any number of ranks, from its beginning to its end in one row; all ranks have as many batches, no
    more than the longest recording needs or an equal division makes.

    Mutations: in `Grid.lanes`, `own` from rank 0; `argsort` of `np.diff(...)`; filler of segment 0.
    """
    data = replace(DATA, carry=2)
    loaders = [eval_batches(split, data, AUDIO, rows, Place(rank, world_size)) for rank in range(world_size)]
    starts_of = {0, *np.cumsum([1, 1, 4, 9, 1, 3, 1, 16, 3]).tolist()}
    seen: list[int] = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) == len(loaders[0])
        ids, resets = (torch.stack([getattr(b, name) for b in batches]) for name in ("segment_ids", "resets"))
        for row, starts in zip(ids.T.tolist(), resets.T.tolist(), strict=True):
            played = [i for i in row if i != FILLER]
            assert row[: len(played)] == played
            for at, (segment, start) in enumerate(zip(row, starts, strict=True)):
                assert start == (segment in starts_of)
                assert start or segment == FILLER or segment == row[at - 1] + 1
            seen += played
    n = n_segments(split, data)
    assert sorted(seen) == list(range(n))
    assert len(loaders[0]) == max(16, -(-n // (rows * world_size)))  # the longest recording has 16


def test_workers_that_are_not_forked_get_no_index(split: Split) -> None:
    """But open it themselves; their batches are the same. Mutation: no `__reduce__` in `Segments`."""
    segments = Segments(split, replace(DATA, crop=True), AUDIO, SEED, batch_size=4)
    small, rows = pickle.dumps(segments), split.index
    split.index = segments.grid.index = np.resize(rows, 100_000)
    try:
        assert len(pickle.dumps(segments)) == len(small)
    finally:
        split.index = segments.grid.index = rows
    for one, other in zip(segments[np.arange(8)][:4], pickle.loads(small)[np.arange(8)][:4], strict=True):
        assert torch.equal(one, other)
