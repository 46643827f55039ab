"""One training step: forward, loss, backward, update."""

from dataclasses import dataclass

import torch

from benchmarks.floors import product_rate, products_per_sample, seconds
from benchmarks.settings import Settings
from sashimi.distributed import Distributed
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective
from sashimi.optim import OptimConfig, build_optimizer


@dataclass(frozen=True)
class TrainSettings(Settings):
    """The step's size."""


def bench_train(config: TrainSettings, device: torch.device) -> dict[str, float]:
    """Seconds of forward, loss, backward and update; the floor is the model's matrix products at the measured rate."""
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(n_layers=config.n_layers)).to(device)
    objective, optimizer = Objective(model), build_optimizer(model.named_parameters(), OptimConfig())
    ids = torch.randint(256, (config.batch_size, config.length + 1), device=device)
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)

    def step() -> None:
        (objective(ids[:, :-1], ids[:, 1:], mask) / mask.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    (taken,) = seconds(config.repetitions, step)
    flop = 6 * products_per_sample(model) * config.batch_size * config.length  # forward once, backward twice
    rate = product_rate(device, config.repetitions)
    return {
        "step_s": taken,
        "floor_s": flop / rate,
        "gflop": flop / 1e9,
        "gemm_gflop_per_s": rate / 1e9,
        "peak_gib": Distributed().peak_memory() / 2**30,
    }
