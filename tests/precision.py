"""Watches the dtypes that reach the arithmetic, for law 5."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sashimi.s4 import S4

REDUCED = (torch.bfloat16, torch.float16)


class Precision(TorchDispatchMode):
    """Counts FFTs, batched products and scans, forward and backward, and lists what ran in reduced precision.

    Anywhere: these, which the state spaces alone use. Between `enter` and `leave` (see `watched`): all arithmetic, thus
    anything but casts and views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.depth = 0
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_product = any(name in func.name() for name in ("fft", "bmm", "scan"))
        self.products += is_product
        arithmetic = self.depth and not func.is_view and "_to_copy" not in func.name()
        if is_product or arithmetic:
            results = result if isinstance(result, tuple) else (result,)
            tensors = [x for x in (*args, *results) if isinstance(x, torch.Tensor)]
            self.faults += [f"{func.name()} in {x.dtype}" for x in tensors if x.dtype in (*REDUCED, torch.complex32)]
        return result


@contextmanager
def watched(module: torch.nn.Module) -> Iterator[Precision]:
    """Record what runs, inside the forward of every S4 layer of the module above all."""
    precision, handles = Precision(), []

    def enter(*_: Any) -> None:
        precision.depth += 1

    def leave(*_: Any) -> None:
        precision.depth -= 1

    for layer in module.modules():
        if isinstance(layer, S4):
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with precision:
        yield precision
    for handle in handles:
        handle.remove()
