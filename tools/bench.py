"""Speed, with its floor: python tools/bench.py kernel|train|generate|stream [--json]; --help lists the rest.

Medians of several repetitions; what is compared takes turns in one process. The floors are measured in it too: the rate
of a large float32 matrix product and of reading memory, on the same threads. Compare figures of one run, not of two.
"""

import io
import json
import math
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch import nn

from sashimi.audio import AudioConfig, Quantizer
from sashimi.distributed import Distributed, run_command
from sashimi.errors import InputError
from sashimi.model import ModelConfig, Sashimi
from sashimi.optim import OptimConfig, build_optimizer
from sashimi.parsing import parse
from sashimi.s4 import S4
from sashimi.sampler import Drawing, make_engine
from sashimi.shard_writer import write_split
from sashimi.shards import open_split
from sashimi.stream import DataConfig, train_batches
from sashimi.trainer import Objective

PARTS = ("kernel", "train", "generate", "stream")


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how large it is."""

    part: str
    """kernel, train, generate or stream."""
    json: bool = False
    """Print one line of JSON instead of a table."""
    length: int = 16000
    """Samples of a segment, for kernel and train."""
    batch_size: int = 2
    """Segments of a training step."""
    n_layers: int = 0
    """Layers a tier; 0: 2 for train and 8 for generate."""
    kernels: tuple[str, ...] = ("krylov", "cauchy")
    """Kernel algorithms to compare: krylov, cauchy, cauchy_keops."""
    threads: int = 0
    """Threads of torch; 0: as it is set. Generation takes one."""
    repetitions: int = 5
    """Repetitions of each figure, of which the median counts."""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise InputError(f"part={self.part}: choose one of {', '.join(PARTS)}")
        if not self.kernels or set(self.kernels) - {"krylov", "cauchy", "cauchy_keops"}:
            raise InputError(f"kernels={list(self.kernels)}: choose from krylov, cauchy, cauchy_keops")
        if self.threads < 0:
            raise InputError(f"threads={self.threads}: must be 0 or more")
        for name in ("length", "batch_size", "repetitions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")


def seconds(repetitions: int, *functions: Callable[[], Any]) -> list[float]:
    """Median seconds of each function, taken in turns after one turn that does not count; waits for a GPU."""
    times: list[list[float]] = [[] for _ in functions]
    for repetition in range(1 + repetitions):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def product_rate(device: torch.device, repetitions: int) -> float:
    """FLOP/s of a large float32 matrix product."""
    a, b = (torch.randn(1536, 1536, device=device) for _ in range(2))
    (product,) = seconds(repetitions, lambda: a @ b)
    return 2 * 1536**3 / product


def read_rate(numbers: int, device: torch.device, repetitions: int) -> float:
    """Bytes/s of reading so many float32 again and again, from whatever cache they fit in."""
    memory = torch.ones(numbers, device=device)
    (read,) = seconds(repetitions, lambda: [memory.sum() for _ in range(20)])
    return 20 * 4 * numbers / read


def products_per_sample(model: Sashimi) -> float:
    """Multiply-adds of all Linear layers a sample of audio, each at the rate at which it runs."""
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            depth = len(re.findall(r"pooled\.(tier|down|up)\b", name))  # a pooling runs at the slower rate
            total += module.in_features * module.out_features / math.prod(model.config.pool[:depth])
    return total


def bench_kernel(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Seconds of a kernel of 64 channels and states, forward and backward, and its float32 error."""
    torch.manual_seed(0)
    layers = {name: S4(64, kernel=name).to(device) for name in config.kernels}

    def once(layer: S4) -> Callable[[], None]:
        return lambda: layer.kernel(config.length).sum().backward()

    figures = seconds(config.repetitions, *map(once, layers.values()))
    result = {f"{name}_s": value for name, value in zip(layers, figures, strict=True)}
    layer = layers[config.kernels[0]]
    exact = S4(64).double().to(device)
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        wide, narrow = exact.kernel(config.length), layer.kernel(config.length)
        result[f"{config.kernels[0]}_error"] = float((wide - narrow).abs().max() / wide.abs().max())
    return result


def bench_train(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Seconds of forward, loss, backward and update; the floor is the model's matrix products at the measured rate."""
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(n_layers=config.n_layers or 2)).to(device)
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


def bench_generate(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Steps a second at batch 1 and samples a second at batch 16, by the engine of choice and by the plain one.

    Floors: at batch 16 the matrix products; at batch 1 reading each weight, from the caches, whenever it is used.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(n_layers=config.n_layers or 8)).to(device).eval()
    result: dict[str, float] = {}
    with torch.inference_mode():
        for batch in (1, 16):
            state, ids = model.init_state(batch), torch.full((batch,), 128, device=device)

            def once(name: str, length: int, batch: int = batch, ids: Any = ids, state: Any = state) -> Callable:
                engine = make_engine(model, Drawing(batch_size=batch, engine=name))  # type: ignore[arg-type]
                uniforms = torch.rand(batch, length, dtype=torch.float64, device=device)
                return lambda: engine(ids, state, uniforms)

            fast, plain = seconds(config.repetitions, once("auto", 1000), once("plain", 100))
            figure = "batch1_steps_per_s" if batch == 1 else "batch16_samples_per_s"
            result |= {figure: 1000 * batch / fast, f"plain_{figure}": 100 * batch / plain}
    work, weights = products_per_sample(model), sum(p.numel() for p in model.parameters())
    result["batch16_floor_samples_per_s"] = product_rate(device, config.repetitions) / (2 * work)
    result["batch1_floor_steps_per_s"] = read_rate(weights, device, config.repetitions) / (4 * work)
    return result | {"parameters": weights, "multiply_adds_per_sample": work}


def bench_stream(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Decoded and quantized samples a second in this process, and of a plain WebDataset pipeline on the same shards."""
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
                sound, _ = sf.read(io.BytesIO(sample["flac"]), dtype="float32")
                for segment in torch.from_numpy(sound).split(config.length):
                    quantizer.encode(segment)

        taken, other = seconds(config.repetitions, ours, plain)
    return {
        "samples_per_s": 20 * 16 * config.length / taken,
        "webdataset_samples_per_s": 30 * 20 * 16000 / other,
    }


def main() -> None:
    """Measure and print."""
    config = parse(BenchConfig, sys.argv[1:], "bench.py", __doc__ or "")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = {"kernel": bench_kernel, "train": bench_train, "generate": bench_generate, "stream": bench_stream}
    figures = measure[config.part](config, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    about = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if config.json:
        print(json.dumps({**figures, **about}))
        return
    for label, value in {**about, **figures}.items():
        print(f"{label:<30} {value:,.4g}" if isinstance(value, float) else f"{label:<30} {value}")


if __name__ == "__main__":
    run_command(main)
