"""Reading, decoding and quantizing audio at random, beside a plain WebDataset pipeline on the same shards in order."""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from benchmarks.floors import seconds
from benchmarks.opening import bench_opening
from benchmarks.settings import Settings
from sashimi.audio import AudioConfig, Quantizer
from sashimi.errors import InputError
from sashimi.flac import read_flac
from sashimi.shard_writer import write_split
from sashimi.split import forget_streams, open_split
from sashimi.stream import DataConfig, train_batches

DEMO = Path(__file__).parents[2] / "shards" / "demo"
ALL = 9_600_000  # samples of a data set, at least, if they are no more than so many recordings
MOST = 2000
LONG = 320_000  # samples of a long recording, at least
BATCH = 16


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

    What is read is the demo's speech, over and over. The floor is decoding alone: whole recordings, their FLAC bytes
    already in memory, by the decoder that the stream has. All of this for recordings of one segment each, as SC09's
    are, and (`long_...`) of so many segments that they are of 320,000 samples. And the opening of a data set of many
    clips.
    """
    short = compare(config.length, 1, config.repetitions)
    long = compare(config.length, max(2, -(-LONG // config.length)), config.repetitions)
    opening = bench_opening(config.clips, config.repetitions)
    return short | {f"long_{name}": figure for name, figure in long.items()} | opening


def compare(length: int, segments: int, repetitions: int) -> dict[str, float]:
    """Samples a second read from recordings of so many segments of `length` samples."""
    try:
        import webdataset
    except ImportError:
        raise InputError("part=stream: compares with webdataset, which is not here: pip install webdataset") from None
    size = segments * length
    recordings = min(-(-ALL // size), MOST)
    demo = open_split(DEMO, "train")
    lengths = (int(demo.rows(recording)["samples"].sum()) for recording in range(demo.n_recordings))
    speech = np.concatenate([demo.read(recording, 0, samples) for recording, samples in enumerate(lengths)])
    sounds = {f"{i}": sound for i, sound in enumerate(np.resize(speech, (recordings, size)))}
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(folder, "train", sounds, demo.sample_rate)
        audio = AudioConfig(demo.sample_rate)
        data = DataConfig(folder, segment=length, workers=0)
        steps = -(-recordings * segments // BATCH)
        batches = train_batches(split, data, audio, 0, 0, BATCH, None)
        shards = [f"{folder}/{name}" for name in split.shard_names]
        quantizer = Quantizer(audio)

        def ours() -> None:
            forget_streams()  # what an epoch of many recordings leaves of the one before
            for _ in range(steps):
                next(batches)

        def plain() -> None:
            for sample in webdataset.WebDataset(shards, shardshuffle=False):
                sound, _ = sf.read(io.BytesIO(sample["flac"]), dtype="int16")
                for start in range(0, size, length):  # in order, without batches
                    quantizer.encode_int16(sound[start : start + length])

        encoded = [sample["flac"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]

        def decode() -> None:
            for recording in encoded:
                assert read_flac(io.BytesIO(recording), len(recording), 0, size)

        taken, other, floor = seconds(repetitions, ours, plain, decode)
    rate, webdataset_rate = steps * BATCH * length / taken, recordings * size / other
    best = recordings * size / floor
    return {
        "samples_per_s": rate,
        "floor_samples_per_s": best,
        "of_floor": rate / best,
        "webdataset_samples_per_s": webdataset_rate,
        "of_webdataset": rate / webdataset_rate,
    }
