"""The convolution kernel of one S4 layer, by each algorithm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.floors import counted_flop, product_rate, seconds
from benchmarks.settings import Settings
from sashimi.errors import InputError
from sashimi.s4 import S4

KERNELS = ("krylov", "cauchy", "cauchy_keops")


@dataclass(frozen=True)
class KernelSettings(Settings):
    """Which algorithms, at what length."""

    kernels: tuple[str, ...] = ("krylov", "cauchy")
    """Kernel algorithms to compare: krylov, cauchy, cauchy_keops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernels(self.kernels)


def check_kernels(kernels: tuple[str, ...]) -> None:
    """InputError unless these are algorithms of a DPLR layer, at least one."""
    if not kernels or set(kernels) - set(KERNELS):
        raise InputError(f"kernels={list(kernels)}: choose from {', '.join(KERNELS)}")


def bench_kernel(config: KernelSettings, device: torch.device) -> dict[str, float]:
    """Seconds of a kernel of 64 channels and states, forward and backward, and its float32 error.

    The floor is an algorithm's own matrix products, as counted by torch, at the measured rate of a large one. A Cauchy
    kernel's sums are elementwise and no product, so its floor says next to nothing.
    """
    torch.manual_seed(0)
    layers = {name: S4(64, kernel=name).to(device) for name in config.kernels}

    def once(layer: S4) -> Callable[[], None]:
        return lambda: layer.kernel(config.length).sum().backward()

    figures = seconds(config.repetitions, *map(once, layers.values()))
    result, rate = {}, product_rate(device, config.repetitions)
    for (name, layer), taken in zip(layers.items(), figures, strict=True):
        floor = counted_flop(once(layer)) / rate
        result |= {f"{name}_s": taken, f"{name}_floor_s": floor, f"{name}_over_floor": taken / floor}
    layer = layers[config.kernels[0]]
    exact = S4(64).double().to(device)
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        wide, narrow = exact.kernel(config.length), layer.kernel(config.length)
        result[f"{config.kernels[0]}_error"] = float((wide - narrow).abs().max() / wide.abs().max())
    return result
