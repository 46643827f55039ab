"""How time and memory are taken, and what the machine can do at best: in the same process, on the same threads."""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sashimi.distributed import Distributed
from sashimi.layers import DownPool, Residual, UpPool
from sashimi.model import Sashimi
from sashimi.native.scan import CHUNK
from sashimi.s4 import S4
from sashimi.ssm import fft_length

_PRODUCTS = 5  # one alone may meet a processor's boost, which a training step does not


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


def forget_peak(device: torch.device) -> int:
    """Bytes held now, from which the peak of `Distributed.peak_memory` begins anew.

    A process's own peak can be forgotten on Linux alone; elsewhere this is the peak so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return Distributed().peak_memory()


# --- rates of the machine ----------------------------------------------------------------------------------------


def large_product(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], Any], int]:
    """Large matrix products, one after another, and their FLOP."""
    a, b = (torch.randn(1536, 1536, device=device, dtype=dtype) for _ in range(2))
    return lambda: [a @ b for _ in range(_PRODUCTS)], _PRODUCTS * 2 * 1536**3


def product_rate(device: torch.device, repetitions: int, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large matrix product."""
    product, flop = large_product(device, dtype)
    (taken,) = seconds(repetitions, product)
    return flop / taken


def read_rate(numbers: int, device: torch.device, repetitions: int) -> float:
    """Bytes/s of reading so many float32 again and again, from whatever cache they fit in."""
    memory = torch.ones(numbers, device=device)
    (read,) = seconds(repetitions, lambda: [memory.sum() for _ in range(20)])
    return 20 * 4 * numbers / read


def large_copy(device: torch.device) -> tuple[Callable[[], Any], int]:
    """Copying 256 MiB, and the bytes read and written."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * 4 * source.numel()


def counted_flop(function: Callable[[], Any]) -> int:
    """FLOP of all matrix products that a function has done, as torch counts them, and of those in compiled code."""

    def batched(added: Any, left: torch.Size, right: torch.Size, **_: Any) -> int:
        return 2 * left.numel() * right[-1]

    def forward(parameters: torch.Size, u: torch.Size, x: torch.Size, **_: Any) -> int:
        (B, L, H), N, T = u, x[-1], CHUNK
        return 2 * H * (N * N * T + B * -(-L // T) * (2 * T * N + T * T + N * N))

    def backward(parameters: torch.Size, signals: torch.Size, states: torch.Size, d_y: torch.Size, **_: Any) -> int:
        (B, L, H), N, T = d_y, states[-1], CHUNK
        return 2 * H * (3 * N * N * T + B * -(-L // T) * (4 * T * N + 2 * T * T + 2 * N * N))

    def response(parameters: torch.Size, x: torch.Size, length: int, **_: Any) -> int:
        (H, N), T = x, CHUNK
        return 2 * H * (N * N * T + -(-length // T) * (T * N + N * N))

    def response_backward(parameters: torch.Size, states: torch.Size, d_y: torch.Size, **_: Any) -> int:
        (H, length), N, T = d_y, states[-1], CHUNK
        return 2 * H * (3 * N * N * T + -(-length // T) * (2 * T * N + 2 * N * N))

    def linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight[0]

    def linear_backward(*shapes: Any, **_: Any) -> int:
        return 2 * linear(*shapes)

    left_out = {
        torch.ops.aten.baddbmm_: batched,
        torch.ops.sashimi.linear: linear,
        torch.ops.sashimi.linear_backward: linear_backward,
        torch.ops.sashimi.scan: forward,
        torch.ops.sashimi.scan_backward: backward,
        torch.ops.sashimi.response: response,
        torch.ops.sashimi.response_backward: response_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=left_out) as counter:
        function()
    return counter.get_total_flops()


# --- what a model needs ------------------------------------------------------------------------------------------


def products_per_sample(model: Sashimi) -> float:
    """Multiply-adds of all Linear layers a sample of audio, each at the rate at which it runs."""
    return sum(
        module.in_features * module.out_features / slower
        for module, slower in _with_rate(model)
        if isinstance(module, nn.Linear)
    )


def fft_seconds(model: Sashimi, batch_size: int, length: int, device: torch.device, repetitions: int) -> float:
    """Seconds of the FFTs that a training step's convolutions need, at the rate of torch.fft on batches of their size.

    Forward: those of u and of K, and the inverse one of y. Backward: that of dy, and the inverse ones of du and dK.
    A kernel's are a batch_size-th of a signal's. Each is zero-padded, so that nothing wraps around.
    """
    layers = [(slower, module.D.numel()) for module, slower in _with_rate(model) if isinstance(module, S4)]
    total = 0.0
    for slower, channels in set(layers):
        n = fft_length(2 * -(-length // slower) - 1)
        signal = torch.randn(batch_size, channels, n, device=device)
        spectrum = torch.fft.rfft(signal)
        forth, back = seconds(
            repetitions, lambda s=signal: torch.fft.rfft(s), lambda s=spectrum, n=n: torch.fft.irfft(s, n=n)
        )
        total += layers.count((slower, channels)) * (2 + 1 / batch_size) * (forth + back)
    return total


@torch.no_grad()
def moved_numbers(model: Sashimi, length: int) -> tuple[int, int]:
    """Numbers that must be read or written in a training step, each layer being one fused kernel.

    Returns (of activations, for one segment of `length` samples; of weights, a step). A layer is a residual branch from
    norm to sum, a pooling, or the head. Forward it reads its input and writes its output; backward it reads both its
    input and its output's gradient and writes its input's gradient: 3 inputs and 2 outputs. What is inside of a layer,
    spectra among it, does not count. A weight is read forward and backward and its gradient written; then AdamW reads
    weight, gradient and two moments and writes all but the gradient: 10 numbers.
    """
    moved = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Any]) -> None:
        nonlocal moved
        moved += 3 * inputs[0].numel() + 2 * (output if isinstance(output, Tensor) else output[0]).numel()

    layers = [module for module in model.modules() if isinstance(module, Residual | DownPool | UpPool)]
    hooks = [layer.register_forward_hook(count) for layer in (*layers, model.head)]
    # Each layer's numbers are in proportion to the length.
    total = model.config.total_pool
    model(torch.zeros(1, total, dtype=torch.int64, device=model.head.weight.device))
    for hook in hooks:
        hook.remove()
    return moved * -(-length // total), 10 * sum(p.numel() for p in model.parameters())


def _with_rate(model: Sashimi) -> Iterator[tuple[nn.Module, int]]:
    """Each module with the number of samples of audio that are one of its own."""
    for name, module in model.named_modules():
        depth = len(re.findall(r"pooled\.(tier|down|up)\b", name))  # a pooling runs at the slower rate
        yield module, math.prod(model.config.pool[:depth])
