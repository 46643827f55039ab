"""Recordings into one tar of the shard format (see `shards`), whole or absent and byte for byte reproducible."""

import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from sashimi.atomic import UNFINISHED
from sashimi.flac import write_flac
from sashimi.shards import seal
from sashimi.split import Split, open_split


class ShardWriter:
    """One tar of recordings, whole or absent: it grows under another name and is renamed when the `with` block ends.

    Equal recordings give equal bytes: headers have no time or owner, JSON keys are sorted, the encoder is fixed.
    """

    def __init__(self, path: Path, sample_rate: int, chunk_samples: int) -> None:
        self.path = path
        self.sample_rate = sample_rate
        self.chunk_samples = chunk_samples

    def __enter__(self) -> Self:
        self.temporary = self.path.with_name(f"{UNFINISHED}{os.getpid()}-{self.path.name}")
        self.file = open(self.temporary, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self.file:
                if error is None:
                    self.file.write(bytes(2 * tarfile.BLOCKSIZE))
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if error is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def add(self, recording: str, blocks: Iterable[np.ndarray], **fields: Any) -> int:
        """Appends a recording given as blocks of int16 samples, any lengths; returns its length in samples.

        `recording` is its key, at most 80 of [A-Za-z0-9_-]; `fields` go into the JSON of each chunk. If `blocks`
        raises, or holds no sample (ValueError), nothing of the recording stays in the tar.
        """
        before = self.file.tell()
        total = 0
        try:
            for number, chunk in enumerate(regroup(blocks, self.chunk_samples)):
                about = {"recording": recording, "start": total, "samples": len(chunk)}
                about |= {"sample_rate": self.sample_rate, **fields}
                self._member(f"{recording}-{number:05d}.flac", write_flac(chunk, self.sample_rate))
                self._member(f"{recording}-{number:05d}.json", json.dumps(about, sort_keys=True).encode())
                total += len(chunk)
            if total == 0:
                raise ValueError(f"recording {recording} has no samples")
        except BaseException:
            self.file.seek(before)
            self.file.truncate()
            raise
        return total

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.file.write(info.tobuf(tarfile.USTAR_FORMAT))
        self.file.write(data)
        self.file.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def regroup(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of `size`, the last one shorter. Holds no more than `size` and one block."""
    held = np.empty(0, np.int16)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held


def write_split(
    folder: str | Path,
    split: str,
    recordings: Mapping[str, np.ndarray],
    sample_rate: int,
    chunk_samples: int = 960_000,
    shard_recordings: int = 1000,
) -> Split:
    """Packs arrays in memory, key -> int16 (samples,), as one split of a shard folder, and opens it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = iter(recordings.items())
    for number in itertools.count():
        batch = list(itertools.islice(items, shard_recordings))
        if not batch:
            break
        with ShardWriter(folder / f"{split}-{number:06d}.tar", sample_rate, chunk_samples) as writer:
            for key, audio in batch:
                writer.add(key, [audio])
    seal(folder, {})
    return open_split(folder, split)
