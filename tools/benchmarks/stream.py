"""Reading, decoding and quantizing audio, beside a plain WebDataset pipeline on the same shards."""

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from benchmarks.floors import seconds
from benchmarks.opening import bench_opening
from benchmarks.settings import Settings
from sashimi.audio import AudioConfig, Quantizer
from sashimi.errors import InputError
from sashimi.shard_writer import write_split
from sashimi.shards import open_split
from sashimi.stream import DataConfig, train_batches


@dataclass(frozen=True)
class StreamSettings(Settings):
    """How large the data set is that is opened."""

    clips: int = 10_000_000
    """Clips of the index that is opened."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clips < 1:
            raise InputError(f"clips={self.clips}: must be at least 1")


def bench_stream(config: StreamSettings, device: torch.device) -> dict[str, float]:
    """Decoded and quantized samples a second in this process, and of a plain WebDataset pipeline on the same shards.

    The floor is decoding alone: the same recordings' FLAC bytes, already in memory, once through soundfile.
    And the opening of a data set of many clips.
    """
    try:
        import webdataset
    except ImportError:
        raise InputError("part=stream: compares with webdataset, which is not here: pip install webdataset") from None
    rng = np.random.default_rng(0)
    walk = {f"{i}": (rng.normal(0, 500, 20 * 16000).cumsum() % 20000 - 10000).astype(np.int16) for i in range(30)}
    data = DataConfig(segment=config.length, workers=0)
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), "train", walk, 16000)
        split = open_split(folder, "train")
        batches = train_batches(split, replace(data, shards=folder), AudioConfig(16000), 0, 0, 16, None)
        shards = [f"{folder}/{name}" for name in split.shard_names]
        quantizer = Quantizer(AudioConfig(16000))

        def ours() -> None:
            for _ in range(20):
                next(batches)

        def plain() -> None:
            for sample in webdataset.WebDataset(shards, shardshuffle=False):
                sound, _ = sf.read(io.BytesIO(sample["flac"]), dtype="int16")
                for segment in torch.from_numpy(sound).split(config.length):  # in order, without batches
                    quantizer.encode(segment)

        encoded = [sample["flac"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]

        def decode() -> None:
            for recording in encoded:
                sf.read(io.BytesIO(recording), dtype="int16")

        taken, other, floor = seconds(config.repetitions, ours, plain, decode)
    rate, best = 20 * 16 * config.length / taken, 30 * 20 * 16000 / floor
    return {
        "samples_per_s": rate,
        "floor_samples_per_s": best,
        "of_floor": rate / best,
        "webdataset_samples_per_s": 30 * 20 * 16000 / other,
        **bench_opening(config.clips, config.repetitions),
    }
