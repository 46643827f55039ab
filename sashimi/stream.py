"""Positions of the training order -> segments of recordings -> batches of levels.

The stream keeps nothing but a count: the position, in segments, from which it starts. Which segment a position
holds and where that segment lies is arithmetic (`order`, `grid`), and reading it is one random access to a shard
(`Segments`), done by torch's DataLoader in background workers. Each rank builds its own stream and reads its own
part of every global batch, so the loader must not be handed to `Accelerator.prepare`, which would divide it again.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sashimi.audio import AudioConfig, Quantizer
from sashimi.errors import InputError
from sashimi.grid import Cuts, Grid, Tail
from sashimi.order import (
    FILLER,
    Int64s,
    accumulation_steps,
    epoch_of,
    passages,
    played_at,
    rank_positions,
    segment_at,
)
from sashimi.shards import DamagedMember
from sashimi.split import Split, open_split

_AHEAD = 1024  # positions that are located together


@dataclass(frozen=True)
class DataConfig:
    """Which recordings are read and how they are cut into segments."""

    shards: str = "shards/demo"
    """Folder of shards made by tools/make_shards.py; or its https://, http:// or s3:// address."""
    cache: str | None = None
    """Folder that keeps whole shards of an address, fetched when first needed and checked; any number of processes and
    machines may share it, and what is in it may be deleted between runs. Left out: each segment is one request."""
    segment: int = 16000
    """Length of a segment in samples: what the model trains on at once. The model's pooling must divide it."""
    tail: Tail = "pad"
    """The end of a recording that fills no whole segment: `pad` makes it a shorter segment of its own, filled up with
    silence that is not scored; `drop` leaves it out. A recording shorter than one segment is padded either way."""
    crop: bool = False
    """In training, shift each recording's segments by a random number of samples, drawn anew every epoch."""
    carry: int = 0
    """Carry the model's state over this many consecutive segments, 2 or more: each row of a batch plays as many before
    it goes elsewhere, the gradient ending at each segment's beginning, and evaluation plays recordings as a whole. 0:
    each segment is played by itself."""
    workers: int = 2
    """Background processes that read and quantize, for each rank; 0 reads in the training process."""
    prefetch: int = 4
    """Micro-batches that each worker prepares ahead."""
    on_damage: Literal["mask", "fatal"] = "mask"
    """A segment that cannot be decoded: `mask` goes on without it and reports it; `fatal`, for the segments trained
    on, saves and stops the run."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise InputError("data.shards='': name a folder made by tools/make_shards.py")
        if self.cache == "":
            raise InputError("data.cache='': name a folder, or leave it out")
        if not 1 <= self.segment <= 1 << 31:
            raise InputError(f"data.segment={self.segment}: give 1 to 2^31 samples, e.g. 16000")
        if self.tail not in ("drop", "pad"):
            raise InputError(f"data.tail={self.tail!r}: choose drop or pad")
        if not (self.carry == 0 or 2 <= self.carry <= 1 << 20):
            raise InputError(f"data.carry={self.carry}: give 2 to {1 << 20} segments, or 0 to carry nothing")
        if not 0 <= self.workers <= 256:
            raise InputError(f"data.workers={self.workers}: give 0 to 256 processes")
        if not 1 <= self.prefetch <= 1000:
            raise InputError(f"data.prefetch={self.prefetch}: give 1 to 1000 micro-batches")
        if self.on_damage not in ("mask", "fatal"):
            raise InputError(f"data.on_damage={self.on_damage!r}: choose mask or fatal")


class Batch(NamedTuple):
    """One micro-batch of B rows of L samples, in the few bytes that go from process to process and to a GPU."""

    levels: Tensor
    """(B, L) uint8, or int32 of more than 8 bits; silence where nothing is scored."""
    samples: Tensor
    """(B,) int64: how many are scored, a row's first ones. 0 in damaged segments and filler rows."""
    segment_ids: Tensor
    """(B,) int64; FILLER in filler rows."""
    resets: Tensor
    """(B,) bool: False where a row goes on from its segment in the batch before; True if nothing is carried."""
    silence: int
    """The level of silence."""
    faults: tuple[str, ...]
    """A line for each segment that could not be decoded: shard, member, reason, segment."""

    @property
    def targets(self) -> Tensor:
        """(B, L) int64 levels."""
        return self.levels.long()

    @property
    def inputs(self) -> Tensor:
        """(B, L) int64: the targets one sample later; `inputs[:, 0]` is silence."""
        return F.pad(self.levels[:, :-1].long(), (1, 0), value=self.silence)

    @property
    def mask(self) -> Tensor:
        """(B, L) bool: the samples to be scored."""
        return torch.arange(self.levels.shape[1], device=self.samples.device) < self.samples.unsqueeze(1)

    @property
    def scored(self) -> int:
        """How many samples are scored."""
        return int(self.samples.sum())

    def to(self, device: torch.device) -> "Batch":
        """The same on another device, without waiting for it if the memory is pinned."""
        levels, samples, ids, resets = (t.to(device, non_blocking=True) for t in self[:4])
        return Batch(levels, samples, ids, resets, self.silence, self.faults)


class Place(NamedTuple):
    """This process among those that share the reading."""

    rank: int = 0
    world_size: int = 1
    pin_memory: bool = False
    """Put batches where a GPU copies them from at once."""
    init_worker: Callable[[int], None] | None = None
    """What each background worker does first, with its number."""


ALONE = Place()


class Located(NamedTuple):
    """Segments of some positions, and where they lie: arrays of one shape."""

    ids: Int64s
    cuts: Cuts
    begins: NDArray[np.bool_]
    """Whether a row does not go on from its segment in the batch before."""


class Segments(Dataset[Batch]):
    """`segments[positions]` is the Batch of these positions (B,) of the training order of `seed`, located or not.

    With seed None, for evaluation, positions are the segment ids themselves (FILLER allowed) and `data.crop` is
    ignored. A segment that cannot be decoded becomes a row with nothing to score and a line in `faults`.

    Padding follows quantization, as in the original: min-max quantizers stretch the samples of the recording
    alone, and padding is exactly the level of silence. Raises InputError if the shards have another sample rate
    than `audio`.
    """

    def __init__(
        self, split: Split, data: DataConfig, audio: AudioConfig, seed: int | None, batch_size: int = 1
    ) -> None:
        """`batch_size`, of all ranks, is a part of the order where state is carried."""
        if split.sample_rate != audio.sample_rate:
            raise InputError(
                f"audio.sample_rate={audio.sample_rate}: {split.folder} was packed at {split.sample_rate} Hz; "
                f"pack it again with --sample-rate {audio.sample_rate}, or train with that audio.sample_rate"
            )
        self.split = split
        self.data, self.audio = data, audio
        self.seed, self.batch_size = seed, batch_size
        self.grid = Grid(split.index, data.segment, data.tail)
        self.quantizer = Quantizer(audio)

    def __reduce__(self) -> tuple[type["Segments"], tuple[Any, ...]]:
        # Where workers are not forked: the grid would be pickled with a full copy of the index.
        return Segments, (self.split, self.data, self.audio, self.seed, self.batch_size)

    def __getitem__(self, positions: Int64s | Located) -> Batch:
        ids, cuts, begins = positions if isinstance(positions, Located) else self.locate(positions)
        silence = self.quantizer.silence
        levels = np.full((len(ids), self.data.segment), silence, self.quantizer.dtype)
        samples, faults = np.zeros(len(ids), np.int64), []
        fields = cuts.recordings, cuts.starts, cuts.samples, cuts.rows
        for row in np.flatnonzero(cuts.samples).tolist():
            recording, start, length, place = (field.item(row) for field in fields)
            try:
                sound = self.split.read(recording, start, length, place)
            except DamagedMember as damage:
                faults.append(f"{damage} (segment {ids[row]}: {_describe(self.split, recording, start, length)})")
            else:
                levels[row, :length] = self.quantizer.encode_int16(sound)
                samples[row] = length
        tensors = [torch.from_numpy(array) for array in (levels, samples, ids, begins)]
        return Batch._make((*tensors, silence, tuple(faults)))

    def locate(self, positions: Int64s) -> Located:
        """The segments of positions of any shape, and where they lie; a recording's first one begins in any case."""
        n, carry = self.grid.n_segments, self.data.carry
        if self.seed is None:
            cuts = self.grid.cut(positions)
            return Located(positions, cuts, cuts.first | (carry == 0))
        if carry:
            ids, epochs, begins = played_at(positions, n, self.seed, carry, self.batch_size)
        else:
            ids, epochs = segment_at(positions, n, self.seed), epoch_of(positions, n)
            begins = np.full(ids.shape, True)
        cuts = self.grid.cut(ids)
        begins = begins | cuts.first
        if self.data.crop:
            cuts = self.grid.crop(cuts, self.seed, epochs)
        return Located(ids, cuts, begins)


class _Ahead(Sampler[Located]):
    """Where the segments of batches lie: of many at once, because arithmetic on few numbers costs as much."""

    def __init__(self, segments: Segments, batches: Iterable[Int64s]) -> None:
        """`batches`: the positions (B,) of each."""
        self.segments, self.batches = segments, batches

    def __iter__(self) -> Iterator[Located]:
        batches = iter(self.batches)
        for first in batches:
            block = np.stack([first, *itertools.islice(batches, _AHEAD // len(first))])
            ids, cuts, begins = self.segments.locate(block)
            for row in range(len(block)):
                yield Located(ids[row], Cuts(*(field[row] for field in cuts)), begins[row])

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # of evaluation's, which end


def train_batches(
    split: Split,
    data: DataConfig,
    audio: AudioConfig,
    seed: int,
    position: int,
    batch_size: int,
    micro_batch: int | None,
    place: Place = ALONE,
) -> Iterator[Batch]:
    """This rank's micro-batches from `position` (segments consumed so far by all ranks) on, without end.

    Each run of `accumulation_steps(...)` of them is the rank's part of one global batch of `batch_size` segments.
    Batches straddle epochs and nothing is dropped. To start at position 10,000,000 costs what position 0 costs.
    Raises InputError if batch_size does not divide.
    """
    accumulation = accumulation_steps(batch_size, micro_batch, place.world_size)
    micro_batch = batch_size // (place.world_size * accumulation)

    def positions() -> Iterator[Int64s]:
        start = position
        while True:
            yield from rank_positions(start, micro_batch, accumulation, place.rank, place.world_size)
            start += batch_size

    return iter(_loader(Segments(split, data, audio, seed, batch_size), positions(), place))


def eval_batches(
    split: Split,
    data: DataConfig,
    audio: AudioConfig,
    batch_size: int,
    place: Place = ALONE,
) -> DataLoader[Batch]:
    """Each segment of the split once over all ranks, in batches of `batch_size` rows a rank.

    Segment ids are dealt to the ranks in turn; with `data.carry`, whole recordings to their rows. Every rank has the
    same number of batches, `len` of the result; where segments run out, rows are filler. It may be iterated again, by
    the same workers. Raises InputError if batch_size is not positive.
    """
    if not 1 <= batch_size <= 1 << 20:
        raise InputError(f"batch_size={batch_size}: give 1 to {1 << 20} segments a rank")
    segments = Segments(split, data, audio, seed=None)
    if data.carry:
        return _loader(segments, segments.grid.lanes(batch_size, place.rank, place.world_size), place)
    n_batches = -(-segments.grid.n_segments // (place.world_size * batch_size))
    ids = np.arange(n_batches * batch_size, dtype=np.int64) * place.world_size + place.rank
    ids[ids >= segments.grid.n_segments] = FILLER
    return _loader(segments, ids.reshape(n_batches, batch_size), place)


class TrainingData:
    """The train and valid splits as one rank of a run reads them."""

    def __init__(
        self,
        data: DataConfig,
        audio: AudioConfig,
        seed: int,
        batch_size: int,
        micro_batch: int,
        place: Place = ALONE,
    ) -> None:
        """`batch_size` is global, `micro_batch` a rank's rows at once (0: all of its rows). See `train_batches`.

        `segments_per_epoch` are the positions of an epoch: with `data.carry` a few of them are filler. `fingerprint`
        tells the content of both splits, wherever they lie.
        """
        self.data, self.audio, self.seed, self.batch_size, self.place = data, audio, seed, batch_size, place
        self.accumulation = accumulation_steps(batch_size, micro_batch, place.world_size)
        self.micro_batch = batch_size // (place.world_size * self.accumulation)
        self.train = open_split(data.shards, "train", data.cache)
        n = n_segments(self.train, data)
        self.segments_per_epoch = math.prod(passages(n, data.carry)) if data.carry else n
        valid = open_split(data.shards, "valid", data.cache)
        checksums = json.dumps([self.train.checksums, valid.checksums])
        self.fingerprint = hashlib.sha256(checksums.encode()).hexdigest()
        self.valid_batches = eval_batches(valid, data, audio, self.micro_batch, place)

    def batches(self, position: int) -> Iterator[Batch]:
        """This rank's micro-batches from `position` on, `accumulation` of them a step, without end."""
        source = (self.train, self.data, self.audio, self.seed)
        return train_batches(*source, position, self.batch_size, self.micro_batch, self.place)

    def describe(self, segment_ids: Sequence[int]) -> list[str]:
        """Names segments of the train split for messages."""
        return describe_segments(self.train, self.data, segment_ids)


def n_segments(split: Split, data: DataConfig) -> int:
    """Segments of a split, each of which is in an epoch once."""
    return Grid(split.index, data.segment, data.tail).n_segments


def describe_segments(split: Split, data: DataConfig, segment_ids: Sequence[int]) -> list[str]:
    """Where each segment lies, for messages: "recording NAME, samples a..b", before any random crop."""
    cuts = Grid(split.index, data.segment, data.tail).cut(np.array(segment_ids, np.int64))
    return [_describe(split, *place) for place in zip(*(field.tolist() for field in cuts[:3]), strict=True)]


def _describe(split: Split, recording: int, start: int, samples: int) -> str:
    return f"recording {split.recording_name(recording)}, samples {start}..{start + samples}"


def _loader(segments: Segments, positions: Iterable[Int64s], place: Place) -> DataLoader[Batch]:
    """One item of `positions` is one Batch, made by a background worker and delivered in order."""
    workers = segments.data.workers
    return DataLoader(
        segments,
        sampler=_Ahead(segments, positions),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=segments.data.prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=place.pin_memory,
        worker_init_fn=place.init_worker,
        generator=torch.Generator(),  # a loader draws a seed it never uses: not from the caller's generator
    )


def _as_it_is(batch: Any) -> Any:
    """In place of torch's default, which would make a list of `faults`."""
    return batch
