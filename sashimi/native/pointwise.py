"""GELU and GLU in compiled code (pointwise.cpp), on CPUs: the bias of the Linear layer before is added on the way.

On the way back its gradient is summed up too; oneDNN takes a third as long again as without for a weight's gradient
with the bias's. PyTorch's own GELU and GLU are as fast forward, and take two and four times as long backward.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sashimi.native.activations import tables
from sashimi.native.library import library_or_none

_FEWEST = 1 << 15  # numbers: for fewer it does not pay
_ROWS = 64  # that a thread takes at a time, and whose part of the bias's gradient is summed up by itself


def serves(x: Tensor) -> bool:
    """Whether `gelu` and `glu` are compiled code here; torch.compile makes its own. It has no second derivatives."""
    other = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    return not other and x.numel() >= _FEWEST and not torch.compiler.is_compiling() and _library() is not None


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x + bias). x: (..., H), bias: (H,) -> (..., H)."""
    if serves(x):
        return Pointwise.apply(x, bias, "gelu")
    return F.gelu(x if bias is None else x + bias)


def glu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """a σ(b), where a and b are the halves of x + bias. x: (..., 2 H), bias: (2 H,) -> (..., H)."""
    if serves(x):
        return Pointwise.apply(x, bias, "glu")
    return F.glu(x if bias is None else x + bias, dim=-1)


class Pointwise(torch.autograd.Function):
    """x (..., n), bias (n) or None -> (..., n), or (..., n / 2) by a "glu"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, name: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.name = name
        return _forward(x, bias, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        d_x, sums = _backward(x, bias, d_y, ctx.name)
        return d_x, None if bias is None else sums.sum(0), None


@torch.library.custom_op("sashimi::pointwise", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    assert name == "gelu" or x.shape[-1] % 2 == 0, x.shape
    y = _forward_shape(x, bias, name)
    _call(f"{name}_forward", y, x.contiguous(), _bias(x, bias), y)
    return y


@_forward.register_fake
def _forward_shape(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (2 if name == "glu" else 1))


@torch.library.custom_op("sashimi::pointwise_backward", mutates_args=(), device_types="cpu")
def _backward(x: Tensor, bias: Tensor | None, d_y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """d_x, and the sums of each _ROWS of its rows: the bias's gradient in parts; none without a bias."""
    d_x, sums = _backward_shapes(x, bias, d_y, name)
    d_y = d_y.contiguous()
    _call(f"{name}_backward", d_y, x.contiguous(), _bias(x, bias), d_y, d_x, None if bias is None else sums)
    return d_x, sums


@_backward.register_fake
def _backward_shapes(x: Tensor, bias: Tensor | None, d_y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else -(-rows // _ROWS), x.shape[-1])


def _bias(x: Tensor, bias: Tensor | None) -> Tensor:
    bias = x.new_zeros(x.shape[-1]) if bias is None else bias.contiguous()
    assert bias.shape == x.shape[-1:], (bias.shape, x.shape)
    return bias


def _call(name: str, y: Tensor, *tensors: Tensor | None) -> None:
    """A function of pointwise.cpp, for the size of y."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in given)
    compiled = _library()
    assert compiled is not None
    sizes = map(ctypes.c_int64, (y.numel() // y.shape[-1], y.shape[-1], _ROWS, torch.get_num_threads()))
    places = (ctypes.c_void_p(tensor if tensor is None else tensor.data_ptr()) for tensor in tensors)
    compiled[name](*sizes, ctypes.byref(tables()), *places)


def _library() -> ctypes.CDLL | None:
    return library_or_none("pointwise", "GELU and GLU", "-fopenmp")
