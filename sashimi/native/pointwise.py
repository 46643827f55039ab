"""GELU and GLU in compiled code (pointwise.cpp), on CPUs: the bias of the Linear layer before is added on the way.

On the way back its gradient is summed up too; oneDNN takes a third as long again as without for a weight's gradient
with the bias's. PyTorch's own GELU and GLU are as fast forward, and take two and four times as long backward.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sashimi.errors import Unavailable
from sashimi.native.activations import Tables, tables
from sashimi.native.library import library

_FEWEST = 1 << 15  # numbers: for fewer it does not pay
_ROWS = 64  # as in pointwise.cpp


def serves(x: Tensor) -> bool:
    """Whether `gelu` and `glu` are compiled code here; torch.compile makes its own."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    return not plain and x.numel() >= _FEWEST and not torch.compiler.is_compiling() and _loaded() is not None


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x + bias). x: (..., H), bias: (H,) -> (..., H)."""
    if serves(x):
        return Pointwise.apply(x, x.new_zeros(x.shape[-1]) if bias is None else bias, "gelu")
    return F.gelu(x if bias is None else x + bias)


def glu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """a σ(b), where a and b are the halves of x + bias. x: (..., 2 H), bias: (2 H,) -> (..., H)."""
    if serves(x):
        return Pointwise.apply(x, x.new_zeros(x.shape[-1]) if bias is None else bias, "glu")
    return F.glu(x if bias is None else x + bias, dim=-1)


class Pointwise(torch.autograd.Function):
    """x (..., n), bias (n) -> (..., n), or half as many by a "glu"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, name: str) -> Tensor:
        x, n = x.contiguous(), x.shape[-1] // (2 if name == "glu" else 1)
        y = x.new_empty(*x.shape[:-1], n)
        _call(f"{name}_forward", y, x, bias, y)
        ctx.save_for_backward(x, bias)
        ctx.name = name
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        d_y, d_x = d_y.contiguous(), torch.empty_like(x)
        sums = x.new_empty(-(-x.numel() // x.shape[-1] // _ROWS), x.shape[-1])
        _call(f"{ctx.name}_backward", d_y, x, bias, d_y, d_x, sums)
        return d_x, sums.sum(0), None


def _call(name: str, y: Tensor, *tensors: Tensor) -> None:
    """A function of pointwise.cpp, for the size of y."""
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    loaded = _loaded()
    assert loaded is not None
    function, fitted = loaded
    sizes = map(ctypes.c_int64, (y.numel() // y.shape[-1], y.shape[-1], torch.get_num_threads()))
    function(name)(*sizes, ctypes.byref(fitted), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))


@functools.cache
def _loaded() -> tuple[Callable[[str], Any], Tables] | None:
    """pointwise.cpp's functions by their names, and what they need; None, if they are not to be had, which is said."""
    try:
        compiled = library("pointwise", "-fopenmp")
    except Unavailable as reason:
        warnings.warn(f"GELU and GLU run in PyTorch, compiled code is not to be had: {reason}", stacklevel=3)
        return None
    return compiled.__getitem__, tables()
