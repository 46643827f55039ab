"""One training step: forward, loss, backward, update."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from benchmarks.floors import (
    counted_flop,
    fft_seconds,
    forget_peak,
    large_copy,
    large_product,
    moved_numbers,
    products_per_sample,
    seconds,
)
from benchmarks.settings import Settings
from sashimi.distributed import Distributed
from sashimi.layers import compile_layers
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective
from sashimi.optim import OptimConfig, build_optimizer
from sashimi.recording import record


@dataclass(frozen=True)
class TrainSettings(Settings):
    """The step's size and precision."""

    precision: Literal["no", "bf16"] = "no"
    """bf16: forward under autocast. State spaces and FFTs stay float32."""
    recompute: bool = False
    """As train.recompute of training: each layer is computed once more for its gradient."""
    compile: bool = False
    """As train.compile of training: the layers by torch.compile."""
    graph: bool = True
    """As train.graph of training: on a GPU, each pass as one CUDA graph."""


def training_step(
    model: Sashimi, batch_size: int, length: int, half: bool = False, graph: bool = False
) -> Callable[[], None]:
    """Forward, loss, backward and update on random ids; `half` for bfloat16, `graph` for passes as CUDA graphs."""
    device = model.head.weight.device
    objective = Objective(model)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig())
    ids = torch.randint(256, (batch_size, length + 1), device=device)
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)
    if graph:
        record(objective, batch, autocast, accumulate=False)

    def step() -> None:
        with autocast():
            nats = objective(*batch)
        (nats / mask.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_train(config: TrainSettings, device: torch.device) -> dict[str, float]:
    """Seconds and memory of forward, loss, backward and update, beside four floors, whose rates are taken in turns.

    floor_s: the Linear layers' products at the measured rate of a large one; products_floor_s: all products that the
    step makes, as torch counts them, at that rate; fft_floor_s: convolutions by FFT, see `fft_seconds`, where the S4
    layers do them so (not on CPUs); memory_floor_s: see `moved_numbers`, at the measured rate of a large copy.
    step_peak_gib is what the process or the GPU held at most beyond what it held before the first step: activations,
    gradients, AdamW's moments.
    """
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(n_layers=config.n_layers)).to(device)
    if config.recompute:
        model.recompute_layers()
    if config.compile:
        compile_layers(model)
    half = config.precision == "bf16"
    step = training_step(model, config.batch_size, config.length, half)
    graph = config.graph and device.type == "cuda"
    held = forget_peak(device)
    timed = training_step(model, config.batch_size, config.length, half, graph=True) if graph else step
    for _ in range(2):  # in the second, AdamW has its moments from the beginning
        timed()
    peak = Distributed().peak_memory()
    flop = 6 * products_per_sample(model) * config.batch_size * config.length  # forward once, backward twice
    product, product_flop = large_product(device, torch.bfloat16 if half else torch.float32)
    copy, copied = large_copy(device)
    taken, product_s, copy_s = seconds(config.repetitions, timed, product, copy)
    rate, bandwidth = product_flop / product_s, copied / copy_s
    activations, weights = moved_numbers(model, config.length)
    moved = (2 if half else 4) * activations * config.batch_size + 4 * weights
    with torch.compiler.set_stance("force_eager"):  # what is compiled or recorded is not counted
        multiplied = counted_flop(step)
    floors = {
        "floor_s": flop / rate,
        "products_floor_s": multiplied / rate,
        "fft_floor_s": fft_seconds(model, config.batch_size, config.length, device, config.repetitions),
        "memory_floor_s": moved / bandwidth,
    }
    return {
        "step_s": taken,
        **floors,
        "step_over_floor": taken / floors["floor_s"],
        "step_over_floors": taken / (floors["products_floor_s"] + floors["memory_floor_s"]),
        "samples_per_s": config.batch_size * config.length / taken,
        "gflop": flop / 1e9,
        "gemm_gflop_per_s": rate / 1e9,
        "moved_gb": moved / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "peak_gib": peak / 2**30,
        "step_peak_gib": (peak - held) / 2**30,
    }
