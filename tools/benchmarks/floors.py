"""How time is taken, and what the machine can do at best: measured in the same process, on the same threads."""

import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sashimi.model import Sashimi


def seconds(repetitions: int, *functions: Callable[[], Any]) -> list[float]:
    """Median seconds of each function, taken in turns after one turn that does not count; waits for a GPU."""
    times: list[list[float]] = [[] for _ in functions]
    for repetition in range(1 + repetitions):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            synchronize()
            if repetition:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def synchronize() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
