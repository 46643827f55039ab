"""How the recordings of a split are cut into segments: from a segment's number to its place, and no table of them.

A split may have ten million recordings, and each rank and each worker of a machine has a grid. So it keeps 8 bytes for
`BLOCK` rows of the index, and reads the rest from the index itself, whose memory map all of them share.
"""

import heapq
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sashimi.order import FILLER, Int64s, crop_offset

BLOCK = 64  # rows of the index
_PIECE = 256 * BLOCK  # rows looked at together when the table is made

Tail = Literal["drop", "pad"]


class Cuts(NamedTuple):
    """Where segments lie: arrays of one shape, int64 but for the last."""

    recordings: Int64s
    starts: Int64s
    """First sample, within the recording."""
    samples: Int64s
    """Samples that the recording has for this segment, at most its length; 0 for FILLER."""
    lengths: Int64s
    """Samples of the whole recording."""
    rows: Int64s
    """Row of the index that holds the first sample; if the segment is shifted, this one or a later one."""
    first: NDArray[np.bool_]
    """Whether it is its recording's first segment; False for FILLER."""


class Grid:
    """The segments of a split, numbered through its recordings.

    A recording of M samples has, for segments of L samples, max(1, ⌊M/L⌋) of them (`tail: drop`) or ⌈M/L⌉ (`pad`).
    They lie end to end from sample 0, or with `crop` from an offset that is drawn for each epoch and recording:

    - `drop`: from [0, M mod L]. All segments are whole. The samples before the first and after the last one, M mod L
      together, are left out in this epoch; so a recording's ends are seen less often than its middle.
    - `pad`: from [0, M mod L − 1], or 0 if M mod L is 0. The last segment is the shorter by the offset and keeps at
      least one sample. The samples before the first one are left out in this epoch; so only its beginning is seen
      less often.
    - A recording shorter than L is one padded segment and is never shifted: it is there as a whole in each epoch.

    So the number of segments does not depend on the offset, and segments stay inside their recording.
    """

    def __init__(self, index: np.ndarray, segment: int, tail: Tail) -> None:
        """Args:
        index: rows (clips,) of shards.INDEX_DTYPE, those of a recording one after another.
        segment: samples of a segment, L.
        """
        self.index = index
        self.segment = segment
        self.tail = tail
        sums = [np.zeros(1, np.int64)]
        for place in range(0, len(index), _PIECE):
            counts, _ = self._counts(slice(place, min(place + _PIECE, len(index))))
            sums.append(np.add.reduceat(counts, np.arange(0, len(counts), BLOCK)))
        self.before = np.concatenate(sums).cumsum()  # segments before each block of rows, and all of them at the end
        self.n_segments = int(self.before[-1])

    def cut(self, ids: Int64s) -> Cuts:
        """Places of the segments `ids` (any shape; FILLER allowed), not shifted."""
        real = np.maximum(ids.ravel(), 0)
        block = np.searchsorted(self.before, real, side="right") - 1
        rows = np.minimum(block[:, None] * BLOCK + np.arange(BLOCK), len(self.index) - 1)
        counts, numbers = self._counts(rows)
        ends = self.before[block][:, None] + counts.cumsum(axis=1)
        column = np.argmax(ends > real[:, None], axis=1)[:, None]
        row, end, count, number = (np.take_along_axis(a, column, 1)[:, 0] for a in (rows, ends, counts, numbers))
        recordings = self.index["recording"][row].astype(np.int64)
        last = self.index[first_rows(self.index, recordings + 1) - 1]
        lengths = last["start"].astype(np.int64) + last["samples"]
        starts = (number + real - (end - count)) * self.segment
        while (late := self.index["start"][row] > starts).any():  # with `drop` it is the row where they end
            row = row - late
        samples = np.minimum(self.segment, lengths - starts)
        filler = ids.ravel() == FILLER
        return Cuts(
            recordings.reshape(ids.shape),
            starts.reshape(ids.shape),
            np.where(filler, 0, samples).reshape(ids.shape),
            lengths.reshape(ids.shape),
            row.reshape(ids.shape),
            (~filler & (starts == 0)).reshape(ids.shape),
        )

    def crop(self, cuts: Cuts, seed: int, epochs: Int64s) -> Cuts:
        """The same segments, shifted by the offsets of `epochs`."""
        rest = cuts.lengths % self.segment
        slack = rest if self.tail == "drop" else np.maximum(rest - 1, 0)
        slack = np.where(cuts.lengths < self.segment, 0, slack)
        starts = cuts.starts + crop_offset(seed, epochs, cuts.recordings, slack)
        samples = np.minimum(self.segment, cuts.lengths - starts)
        return cuts._replace(starts=starts, samples=np.where(cuts.samples, samples, 0))

    def firsts(self) -> Int64s:
        """First segment of each recording, and the number of all segments at the end: 8 bytes a recording."""
        counts, _ = self._counts(slice(0, len(self.index)))
        begins = np.flatnonzero(self.index["start"] == 0)
        return np.concatenate([np.zeros(1, np.int64), np.add.reduceat(counts, begins).cumsum()])

    def lanes(self, rows: int, rank: int, world_size: int) -> Int64s:
        """Segments that a rank's rows play one after another, whole recordings: ids (steps, up to `rows`), then FILLER.

        Recordings, the longest first, go to the row of any rank that has least to do so far.
        """
        first = self.firsts()
        to_do = [(0, lane) for lane in range(rows * world_size)]  # a heap: segments, row · world_size + rank
        own: dict[int, list[Int64s]] = {lane: [] for lane in range(rank, len(to_do), world_size)}
        for recording in np.argsort(-np.diff(first), kind="stable"):
            ids = np.arange(*first[recording : recording + 2])
            segments, lane = to_do[0]
            heapq.heapreplace(to_do, (segments + len(ids), lane))
            if lane in own:
                own[lane].append(ids)
        played = [np.concatenate(recordings) for recordings in own.values() if recordings]
        plan = np.full((max(to_do)[0], max(1, len(played))), FILLER)
        for row, ids in enumerate(played):
            plan[: len(ids), row] = ids
        return plan

    def _counts(self, rows: Int64s | slice) -> tuple[Int64s, Int64s]:
        """Segments that belong to each row, and how many of its recording belong to the rows before it.

        With `pad` they are those that start in the row, with `drop` those that end in it, and the one of a recording
        shorter than a segment. So the counts of a recording's rows add up to its segments without a look at the others.
        """
        L = self.segment
        start = self.index["start"][rows].astype(np.int64)
        stop = start + self.index["samples"][rows]
        if self.tail == "pad":
            before = (start + L - 1) // L
            return (stop + L - 1) // L - before, before
        before = start // L
        short = (stop < L) & self._last(rows)
        return stop // L - before + short, before

    def _last(self, rows: Int64s | slice) -> np.ndarray:
        """Which rows are the last ones of their recordings."""
        if isinstance(rows, slice):
            following = self.index["start"][rows.start + 1 : rows.stop + 1] == 0
            return np.append(following, True) if rows.stop == len(self.index) else following
        end = len(self.index) - 1
        return (rows == end) | (self.index["start"][np.minimum(rows + 1, end)] == 0)


def first_rows(index: np.ndarray, recordings: Int64s) -> Int64s:
    """Where recordings begin in an index (clips,), any shape; for the number of recordings, its end.

    Every recording has a row at least, so little is left to search, and nothing where each has one.
    """
    numbers, last = index["recording"], len(index) - 1
    low, high = recordings, recordings + last - int(numbers[last])
    while (low < high).any():
        middle = (low + high) // 2
        before = (low < high) & (numbers[np.minimum(middle, last)] < recordings)
        low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
    return low
