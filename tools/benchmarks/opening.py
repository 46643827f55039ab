"""Opening a large data set: an index of many clips, with shards that have their sizes and no audio."""

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np

from benchmarks.floors import seconds
from sashimi.atomic import write_json
from sashimi.audio import AudioConfig
from sashimi.shards import FORMAT, INDEX_DTYPE, SPLITS
from sashimi.split import open_split
from sashimi.stream import DataConfig, Segments

SHARD_CLIPS = 10_000
CLIP_BYTES = 20_000


def bench_opening(clips: int, repetitions: int) -> dict[str, float]:
    """Seconds from a folder to the first segment's place, and MB that this takes at most beside the mapped index.

    Each clip is a second, and ten are a recording.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), clips, per_recording=10)

        def opened() -> Segments:
            segments = Segments(open_split(folder, "train"), DataConfig(shards=folder), AudioConfig(16000), seed=0)
            segments.grid.cut(np.arange(1))
            return segments

        (taken,) = seconds(repetitions, opened)
        tracemalloc.start()
        opened()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return {"clips": clips, "open_s": taken, "open_peak_mb": peak / 1e6}


def write_index(folder: Path, clips: int, per_recording: int) -> None:
    """A folder of one split with so many clips of 1 s at 16 kHz, its shards sparse files."""
    index, rows = np.zeros(clips, INDEX_DTYPE), np.arange(clips)
    index["shard"], place = np.divmod(rows, SHARD_CLIPS // per_recording * per_recording)
    index["offset"], index["bytes"] = place * CLIP_BYTES, CLIP_BYTES
    index["recording"], chunk = np.divmod(rows, per_recording)
    index["start"], index["samples"] = chunk * 16000, 16000
    index["label"] = -1
    np.save(folder / "train.npy", index)
    sizes = np.bincount(index["shard"]) * CLIP_BYTES
    shards = [
        {"name": f"train-{number:06d}.tar", "bytes": int(size), "sha256": "0" * 64} for number, size in enumerate(sizes)
    ]
    for shard in shards:
        with open(folder / shard["name"], "wb") as file:
            file.truncate(shard["bytes"])
    splits = {split: {"recordings": 0, "clips": 0, "samples": 0, "shards": []} for split in SPLITS}
    recordings = -(-clips // per_recording)
    splits["train"] = {"recordings": recordings, "clips": clips, "samples": clips * 16000, "shards": shards}
    write_json(folder / "manifest.json", {"format": FORMAT, "sample_rate": 16000, "labels": [], "splits": splits})
