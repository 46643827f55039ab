"""Throughput over batch size, in training and in generation: powers of two to saturation."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.floors import seconds
from benchmarks.plots import check_plot, plot
from benchmarks.settings import Settings
from benchmarks.train import training_step
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.sampler import Drawing, make_engine

_GAIN = 1.05  # what a larger batch must bring
_PATIENCE = 3  # doublings in a row that bring less: an engine may have other code for small batches than for large ones


@dataclass(frozen=True)
class BatchSettings(Settings):
    """Lengths, model, and where the plot goes."""

    length: int = 2000
    """Samples of a segment, in training."""
    clip_length: int = 200
    """Samples of a clip, in generation."""
    largest: int = 256
    """Largest batch to try."""
    plot: str | None = None
    """File for a plot, .png or .svg."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_length", "largest"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        check_plot(self.plot)


def bench_batch(config: BatchSettings, device: torch.device) -> dict[str, float]:
    """Samples a second at each batch size, until three doublings in a row gain less than 5 % on the best."""
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(n_layers=config.n_layers)).to(device)
    training = _until_saturated(config, lambda batch_size: _train(model, config, batch_size))
    model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the sampler does
    with torch.inference_mode():
        generation = _until_saturated(config, lambda batch_size: _generate(model, config, batch_size))
    torch.set_num_threads(threads)
    if config.plot is not None:
        panels = {"training": {"train": training}, "generation": {"generate": generation}}
        plot(config.plot, panels, "batch size", "samples a second", log_x=True, from_zero=True)
    result = {}
    for name, points in (("train", training), ("generate", generation)):
        best = max(rate for _, rate in points)
        result |= {f"{name}_batch{batch_size}_samples_per_s": rate for batch_size, rate in points}
        result[f"{name}_saturated_at"] = min(size for size, rate in points if rate * _GAIN >= best)
    return result


def _until_saturated(config: BatchSettings, work: Callable[[int], tuple[Callable, int]]) -> list[tuple[int, float]]:
    """(batch size, samples a second) for 1, 2, 4, …: to the largest, or until memory ends or nothing is gained."""
    points: list[tuple[int, float]] = []
    batch_size, best, idle = 1, 0.0, 0
    while batch_size <= config.largest and idle < _PATIENCE:
        try:
            once, samples = work(batch_size)
            (taken,) = seconds(config.repetitions, once)
        except torch.OutOfMemoryError:  # a GPU's
            if not points:
                raise
            break
        del once
        gc.collect()  # a recorded step is a cycle of references, and has memory of its own
        rate = samples / taken
        points.append((batch_size, rate))
        idle = 0 if rate > _GAIN * best else idle + 1
        best = max(best, rate)
        batch_size *= 2
    return points


def _train(model: Sashimi, config: BatchSettings, batch_size: int) -> tuple[Callable[[], None], int]:
    graph = model.head.weight.device.type == "cuda"
    return training_step(model, batch_size, config.length, graph=graph), batch_size * config.length


def _generate(model: Sashimi, config: BatchSettings, batch_size: int) -> tuple[Callable[[], object], int]:
    device = model.head.weight.device
    engine, state = make_engine(model, Drawing(batch_size=batch_size)), model.init_state(batch_size)
    ids = torch.full((batch_size,), model.config.levels // 2, device=device)
    uniforms = torch.rand(batch_size, config.clip_length, dtype=torch.float64, device=device)
    return lambda: engine(ids, state, uniforms), batch_size * config.clip_length
