"""Is a folder of shards what was written? Reads every byte, decodes every clip, and measures the audio while at it."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import log10, nan
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sashimi.errors import InputError
from sashimi.shards import INDEX_DTYPE, SPLITS, DamagedMember, Row, read_index, read_manifest, scan_shard
from sashimi.split import member_name, read_clip

FRAME_SECONDS = 0.02
SILENCE = 10 ** (-60 / 20)  # a frame with a lower RMS is silent: -60 dB of full scale


@dataclass
class Census:
    """What a shard or a split holds, and a line for each thing that is wrong with it."""

    shards: int = 0
    recordings: int = 0
    clips: int = 0
    samples: int = 0
    energy: float = 0.0
    """Sum of squares; full scale is 1."""
    frames: int = 0
    """Whole stretches of 20 ms."""
    silent_frames: int = 0
    faults: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Census") -> "Census":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def add_audio(self, audio: np.ndarray, sample_rate: int) -> None:
        """Measures a clip, int16 (samples,)."""
        x = audio.astype(np.float32) / 32768
        size = max(1, round(FRAME_SECONDS * sample_rate))
        power = np.square(x[: len(x) // size * size]).reshape(-1, size).mean(axis=1)
        self.samples += len(x)
        self.energy += float(np.square(x).sum(dtype=np.float64))
        self.frames += len(power)
        self.silent_frames += int(np.count_nonzero(power < SILENCE**2))

    @property
    def loudness(self) -> float:
        """RMS in dB of full scale (dBFS); nan without audio."""
        return 10 * log10(max(self.energy / self.samples, 1e-12)) if self.samples else nan

    @property
    def silence(self) -> float:
        """Share of the frames that are silent, 0 to 1; nan without frames."""
        return self.silent_frames / self.frames if self.frames else nan


def verify(folder: Path) -> dict[str, Census]:
    """Checks checksums, index and clips of every split. InputError if there is no manifest to check against."""
    manifest = read_manifest(folder)
    return {split: _verify_split(folder, split, manifest) for split in SPLITS}


def _verify_split(folder: Path, split: str, manifest: dict[str, Any]) -> Census:
    about = manifest["splits"][split]
    census = Census()
    index = None
    try:
        index = read_index(folder, split, about["clips"]) if about["clips"] else np.empty(0, INDEX_DTYPE)
    except InputError as error:
        census.faults.append(str(error))
    names = [shard["name"] for shard in about["shards"]]
    strays = [path for path in sorted(folder.glob(f"{split}-*.tar")) if path.name not in names]
    census.faults += [f"{path}: not in the manifest" for path in strays]
    check = partial(_verify_shard, folder, manifest["sample_rate"], index)
    with ThreadPoolExecutor() as pool:
        for shard in tqdm(pool.map(check, itertools.count(), about["shards"]), split, len(names), unit=" shards"):
            census += shard
    counts = {name: (getattr(census, name), about[name]) for name in ("recordings", "clips", "samples")}
    for name, (found, promised) in counts.items():
        if found != promised and not census.faults:
            census.faults.append(f"{folder}: {split} has {found} {name}, the manifest says {promised}")
    return census


def _verify_shard(
    folder: Path, sample_rate: int, index: np.ndarray | None, number: int, about: dict[str, Any]
) -> Census:
    """A tar against its manifest entry, against the index (unless there is none), and against itself."""
    path = folder / about["name"]
    census = Census(shards=1)
    try:
        scan = scan_shard(path)
    except DamagedMember as damage:
        census.faults.append(str(damage))
        return census
    rows = scan.rows
    if (scan.bytes, scan.sha256) != (about["bytes"], about["sha256"]):
        census.faults.append(f"{path}: size or SHA-256 differ from the manifest's")
    if index is not None and not _same_rows(rows, index[index["shard"] == number]):
        census.faults.append(f"{path}: the index says otherwise: run again with --rebuild-index")
    ends = rows["start"] + rows["samples"]
    expected = np.where(np.diff(rows["recording"], prepend=-1) == 0, np.roll(ends, 1), 0)
    for row in map(Row._make, rows[rows["start"] != expected].tolist()):
        census.faults.append(f"{path}: {member_name(path, row)}: a chunk before it is missing")
    for row in map(Row._make, rows.tolist()):
        try:
            census.add_audio(read_clip(path, row, 0, row.samples, sample_rate), sample_rate)
        except DamagedMember as damage:
            census.faults.append(str(damage))
    census.recordings = len(np.unique(rows["recording"]))
    census.clips = len(rows)
    return census


def _same_rows(scanned: np.ndarray, indexed: np.ndarray) -> bool:
    """Shard and recording are numbered within the tar in one and within the split in the other."""
    fields = ["offset", "bytes", "start", "samples", "label"]
    if not np.array_equal(scanned[fields], indexed[fields]):
        return False
    return np.array_equal(np.diff(scanned["recording"]), np.diff(indexed["recording"]))
