"""Linear layers in compiled code (linear.cpp), on CPUs, with GELU before and GLU after.

A block of rows goes through all of it while it is in the nearer caches. The products are made for layers of a few
hundred channels: for these, on a Zen 4, they are faster by a sixth than those of MKL and oneDNN, which PyTorch has.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sashimi.native.activations import tables
from sashimi.native.library import aligned, library_or_none

_VECTOR = 16  # numbers
_FEWEST_ROWS, _FEWEST = 256, 1 << 22  # rows, and products of two numbers: for fewer the calls cost too much
_MOST = 1 << 20  # weights: more do not stay in the caches, which PyTorch's libraries are made for
_PART = 512  # rows, at least if they are many, whose gradients of the parameters are summed up by themselves
_LEAST_PARTS, _MOST_PARTS = 4, 32


def serves(x: Tensor, weight: Tensor, glu: bool) -> bool:
    """Whether `linear` is for such inputs, and pays; torch.compile makes its own code."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    of_floats = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight))
    whole = weight.shape[1] % _VECTOR == 0 and weight.shape[0] % (2 * _VECTOR if glu else _VECTOR) == 0
    if not of_floats or not whole or weight.numel() > _MOST:
        return False
    many = x.numel() >= _FEWEST_ROWS * x.shape[-1] and x.numel() * len(weight) >= _FEWEST
    return many and _library() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, glu: bool) -> Tensor:
    """The layer of GELU(x), if `gelu`, and if `glu` a σ(b) of the halves a and b of that.

    x (..., K), weight (N, K), bias (N,), all float32 on a CPU; K, N and, with `glu`, N/2 are multiples of 16. ->
    (..., N), or (..., N/2). Every bit is the same for any number of threads. It has first derivatives alone, and none
    by torch.func.
    """
    return Affine.apply(x, weight, bias, gelu, glu)


class Affine(torch.autograd.Function):
    """As `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, glu: bool) -> Tensor:
        y, h = _forward(x, weight, bias, gelu, glu)
        ctx.save_for_backward(x, weight, h)
        ctx.activations = gelu, glu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(*ctx.saved_tensors, d_y, *ctx.activations), None, None


@torch.library.custom_op("sashimi::linear", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, glu: bool) -> tuple[Tensor, Tensor]:
    """y, and what GLU is taken of, (..., N), if it is."""
    (N, K), (y, h) = weight.shape, _forward_shapes(x, weight, bias, gelu, glu)
    _call("forward", x, weight, gelu, glu, aligned(bias), weight.new_empty(K, N), h, y)
    return y, h


@_forward.register_fake
def _forward_shapes(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, glu: bool) -> tuple[Tensor, Tensor]:
    h = x.new_empty(*x.shape[:-1], len(weight))
    return (x.new_empty(*x.shape[:-1], len(weight) // 2), h) if glu else (h, x.new_empty(0))


@torch.library.custom_op("sashimi::linear_backward", mutates_args=(), device_types="cpu")
def _backward(
    x: Tensor, weight: Tensor, h: Tensor, d_y: Tensor, gelu: bool, glu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (N, K), rows = weight.shape, x.numel() // weight.shape[1]
    part = -(-rows // min(max(rows // _PART, _LEAST_PARTS), _MOST_PARTS))
    sums = x.new_empty(-(-rows // part), N * (K + 1))
    d_x, d_weight, d_bias = _backward_shapes(x, weight, h, d_y, gelu, glu)
    given = (h.contiguous(), d_y.contiguous(), sums, d_x, d_weight, d_bias)
    _call("backward", x, weight, gelu, glu, *given, part=part)
    return d_x, d_weight, d_bias


@_backward.register_fake
def _backward_shapes(
    x: Tensor, weight: Tensor, h: Tensor, d_y: Tensor, gelu: bool, glu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _call(name: str, x: Tensor, weight: Tensor, gelu: bool, glu: bool, *tensors: Tensor, part: int = 0) -> None:
    """A function of linear.cpp."""
    (N, K), threads, compiled = weight.shape, torch.get_num_threads(), _library()
    assert compiled is not None
    assert x.shape[-1] == K
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    memory = x.new_empty(threads, compiled.block(), 2 * K + N)
    given = memory, aligned(x), aligned(weight), *tensors
    sizes = map(ctypes.c_int64, (x.numel() // K, K, N, threads, gelu, glu, part))
    compiled[name](*sizes, ctypes.byref(tables()), *(ctypes.c_void_p(t.data_ptr()) for t in given))


def _library() -> ctypes.CDLL | None:
    return library_or_none("linear", "Linear layers", "-fopenmp")
