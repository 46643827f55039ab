"""Generation, sample by sample."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.floors import product_rate, products_per_sample, read_rate, seconds
from benchmarks.settings import Settings
from sashimi.model import ModelConfig, Sashimi
from sashimi.sampler import Drawing, make_engine


@dataclass(frozen=True)
class GenerateSettings(Settings):
    """The model's size."""

    n_layers: int = 8
    """Layers a tier."""


def bench_generate(config: GenerateSettings, device: torch.device) -> dict[str, float]:
    """Steps a second at batch 1 and samples a second at batch 16, by the engine of choice and by the plain one.

    Floors: at batch 16 the matrix products; at batch 1 reading each weight, from the caches, whenever it is used.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Sashimi(ModelConfig(n_layers=config.n_layers)).to(device).eval()
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
    products = product_rate(device, config.repetitions) / (2 * work)
    reads = read_rate(weights, device, config.repetitions) / (4 * work)
    return result | {
        "batch1_floor_steps_per_s": reads,
        "batch16_floor_samples_per_s": products,
        "batch1_of_floor": result["batch1_steps_per_s"] / reads,
        "batch16_of_floor": result["batch16_samples_per_s"] / products,
        "parameters": weights,
        "multiply_adds_per_sample": work,
    }
