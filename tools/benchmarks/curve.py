"""Bits per sample over seconds of training on real audio, by each kernel algorithm."""

import copy
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.floors import synchronize
from benchmarks.kernel import check_kernels
from benchmarks.plots import check_plot, plot
from benchmarks.settings import Settings
from sashimi.audio import AudioConfig
from sashimi.distributed import Distributed
from sashimi.errors import InputError
from sashimi.loss import bits_per_sample
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective
from sashimi.optim import OptimConfig, build_optimizer
from sashimi.split import open_split
from sashimi.stream import Batch, DataConfig, TrainingData
from sashimi.trainer import evaluate


@dataclass(frozen=True)
class CurveSettings(Settings):
    """What is trained, how long, and where the plot goes."""

    data: str = "shards/demo"
    """Folder of shards to train and validate on."""
    length: int = 4096
    """Samples of a segment."""
    batch_size: int = 8
    """Segments of a batch."""
    d_model: int = 32
    """Channels at the audio rate."""
    lr: float = 0.002
    """Learning rate, constant."""
    kernels: tuple[str, ...] = ("krylov", "cauchy")
    """Kernel algorithms to compare: krylov, cauchy, cauchy_keops."""
    seconds: float = 120
    """Seconds that each may train for."""
    every: float = 10
    """Seconds between evaluations of the validation split; these do not count."""
    plot: str | None = None
    """File for a plot, .png or .svg."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernels(self.kernels)
        for name in ("lr", "seconds", "every"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)}: must be above 0")
        if self.seconds / self.every > 1000:
            raise InputError(f"every={self.every}: more than 1000 evaluations in seconds={self.seconds}")
        check_plot(self.plot)


class Racer:
    """One kernel's model, its own clock, and the bits per sample on the validation split whenever that has struck."""

    def __init__(self, start: Sashimi, kernel: str, data: TrainingData, config: CurveSettings) -> None:
        self.device, self.config = start.head.weight.device, config
        self.model = Sashimi(replace(start.config, kernel=kernel)).to(self.device)
        self.model.load_state_dict(start.state_dict())
        optim = OptimConfig(lr=config.lr)
        self.objective, self.optimizer = Objective(self.model), build_optimizer(self.model.named_parameters(), optim)
        self.batches = data.batches(0)
        self.steps, self.seconds = 0, 0.0
        self.bits: list[tuple[float, float]] = []  # after so many seconds

    @property
    def mark(self) -> float:
        """Seconds after which the next evaluation is due."""
        return min(len(self.bits) * self.config.every, self.config.seconds)

    @property
    def finished(self) -> bool:
        """Whether the last evaluation was at the end."""
        return len(self.bits) > 0 and self.bits[-1][0] >= self.config.seconds

    def step(self) -> None:
        """One step, timed; the batch is read before."""
        batch = next(self.batches)
        synchronize()
        start = time.perf_counter()
        self.backward(self.objective, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize()
        self.seconds += time.perf_counter() - start
        self.steps += 1

    def backward(self, objective: Objective, batch: Batch) -> None:
        """Gradients of a batch's mean."""
        batch = batch.to(self.device)
        (objective(batch.inputs, batch.targets, batch.mask) / max(batch.scored, 1)).backward()

    def warm_up(self) -> None:
        """Compile what is compiled at first use, with gradients that are thrown away."""
        self.backward(copy.deepcopy(self.objective), next(self.batches))


def bench_curve(config: CurveSettings, device: torch.device) -> dict[str, float]:
    """Bits per sample on the validation split after so many seconds of training, and how many steps those were.

    All start from the same weights and see the same segments in the same order. Whoever has trained the fewest seconds
    takes the next step, so that what else the machine does befalls all alike. Reading and evaluation are not counted;
    one and the same model, given the weights, evaluates all.
    """
    audio = AudioConfig(open_split(config.data, "train").sample_rate)
    data = TrainingData(
        DataConfig(config.data, segment=config.length, crop=True, workers=0), audio, 0, config.batch_size, 0
    )
    torch.manual_seed(0)
    judge = Sashimi(ModelConfig(d_model=config.d_model, n_layers=config.n_layers)).to(device)
    racers = {kernel: Racer(judge, kernel, data, config) for kernel in config.kernels}
    dist = Distributed()
    for racer in racers.values():
        racer.warm_up()
    while racing := [racer for racer in racers.values() if not racer.finished]:
        racer = min(racing, key=lambda racer: racer.seconds)
        if racer.seconds < racer.mark:
            racer.step()
            continue
        judge.load_state_dict(racer.model.state_dict())
        nats, count, _ = evaluate(Objective(judge), data.valid_batches, dist)
        racer.bits.append((racer.seconds, bits_per_sample(nats, count)))
    if config.plot is not None:
        lines = {kernel: racer.bits for kernel, racer in racers.items()}
        plot(config.plot, {"validation": lines}, "seconds of training", "bits per sample")
    result: dict[str, float] = {}
    for kernel, racer in racers.items():
        result |= {f"{kernel}_steps": racer.steps, f"{kernel}_step_s": racer.seconds / max(racer.steps, 1)}
        result |= {f"{kernel}_bits_after_{round(i * config.every, 3):g}_s": b for i, (_, b) in enumerate(racer.bits)}
    return result
