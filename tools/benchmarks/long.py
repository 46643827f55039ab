"""Recordings of growing length, played in segments with the model's state carried: time a sample, and memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.floors import forget_peak, seconds
from benchmarks.settings import Settings
from sashimi.distributed import Distributed
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective, Rows
from sashimi.stream import Batch


@dataclass(frozen=True)
class LongSettings(Settings):
    """How long a segment is, and the longest recording."""

    length: int = 16384
    """Samples of a segment, a multiple of 16."""
    batch_size: int = 1
    """Recordings played at once."""
    longest: int = 64
    """Segments of the longest recording; the shorter ones have half as many, down to one."""
    repetitions: int = 1
    """Repetitions of each figure, of which the median counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % 16:
            raise InputError(f"length={self.length}: must be a multiple of 16, the model's total pooling")
        if self.longest < 1:
            raise InputError(f"longest={self.longest}: must be at least 1")


def bench_long(config: LongSettings, device: torch.device) -> dict[str, float]:
    """Microseconds a sample to score a recording, and the most memory beyond the model's own, for each length."""
    torch.manual_seed(0)
    objective = Objective(Sashimi(ModelConfig(n_layers=config.n_layers)).to(device).eval(), carry=True)
    levels = torch.randint(256, (config.batch_size, config.length), dtype=torch.uint8)
    ids = torch.zeros(config.batch_size, dtype=torch.int64)
    segment = Batch(levels, ids + config.length, ids, ids > 0, 128, ())

    def play(segments: int) -> Callable[[], None]:
        def once() -> None:
            rows = Rows(objective.beginning)
            with torch.inference_mode():
                for _ in range(segments):
                    float(rows.play(objective, segment, device))

        return once

    counts = [1 << power for power in range(config.longest.bit_length())]
    figures = seconds(config.repetitions, *map(play, counts))
    result = {}
    for count, taken in zip(counts, figures, strict=True):
        before = forget_peak(device)
        play(count)()
        samples = config.batch_size * count * config.length
        result[f"{count * config.length}_us_per_sample"] = 1e6 * taken / samples
        result[f"{count * config.length}_gib"] = (Distributed().peak_memory() - before) / 2**30
    return result
