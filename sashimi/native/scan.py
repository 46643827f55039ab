"""`scan.scan` in compiled code (scan.cpp), on CPUs, for systems that are diagonal or diagonal plus rank one.

Shapes: **B** batch, **L** samples, **H** channels, **N** real state size, **P** modes: N/2, padded to whole vectors.
"""

import ctypes
import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sashimi.errors import Unavailable
from sashimi.native.library import library
from sashimi.ssm import Recurrence

CHUNK = 64  # samples, as in scan.cpp
_NAMES = {torch.float32: "float", torch.float64: "double"}


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether there is compiled code for this CPU; if not, the reason has been said once."""
    return _loaded()


@functools.cache
def _loaded() -> bool:
    try:
        _library()
    except Unavailable as reason:
        warnings.warn(f"state spaces run in PyTorch, compiled code is not to be had: {reason}", stacklevel=3)
        return False
    return True


def scan(system: Recurrence, D: Tensor, u: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x_{k+1} = A x_k + B u_k, y_k = C x_{k+1} + D u_k from state x, on a CPU, in float32 or float64, for any L >= 1.

    D (H,), u (B, L, H), x (B, H, N) or None for zeros -> y (B, L, H) and the state after, which has no gradient, or
    None. Every bit is the same for any number of threads. Raises MemoryError.
    """
    H, N = system.C.shape
    padding = -(N // 2) % _vector(u.dtype)

    def padded(halves: Tensor) -> Tensor:
        return F.pad(halves.unflatten(-1, (2, -1)), (0, padding)).flatten(-2) if padding else halves

    zeros = torch.zeros_like(system.C)
    decay = torch.cat((system.decay_real, system.decay_imag), dim=-1)
    vectors = (decay, *(zeros if v is None else v for v in (system.a, system.b)), system.B, system.C)
    parameters = torch.cat([*(padded(vector) for vector in vectors), D.unsqueeze(-1)], dim=-1)
    before = u.new_zeros(len(u), H, N + 2 * padding) if x is None else padded(x)
    y, after = Scan.apply(parameters, u, before)
    if x is None:
        return y, None
    return y, after.unflatten(-1, (2, -1))[..., : N // 2].flatten(-2)


class Scan(torch.autograd.Function):
    """parameters (H, 10 P + 1), u (B, L, H), x (B, H, 2 P) -> y (B, L, H) and the state after, (B, H, 2 P).

    A channel's parameters are A's decay, a and b, then B, C, each (2 P), and D.
    """

    @staticmethod
    def forward(ctx: Any, parameters: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, after, states = _forward(parameters, u, x)
        ctx.save_for_backward(parameters, u, states)
        ctx.mark_non_differentiable(after)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return _backward(*ctx.saved_tensors, d_y)


def _library() -> ctypes.CDLL:
    return library("scan", "-fopenmp")


@torch.compiler.assume_constant_result
def _vector(dtype: torch.dtype) -> int:
    """Numbers in a vector."""
    return _library().vector_bytes() // dtype.itemsize


def _call(name: str, u: Tensor, states: Tensor, *tensors: Tensor) -> None:
    """A function of scan.cpp, for these sizes."""
    (B, L, H), N = u.shape, states.shape[-1]
    assert all(tensor.dtype == u.dtype and tensor.is_contiguous() for tensor in tensors)
    call = getattr(_library(), f"{name}_{_NAMES[u.dtype]}")
    sizes = map(ctypes.c_int64, (B, L, H, N // 2, torch.get_num_threads()))
    if not call(*sizes, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)):
        raise MemoryError(f"{name} of a state space of {H} channels and {N} states")


@torch.library.custom_op("sashimi::scan", mutates_args=(), device_types="cpu")
def _forward(parameters: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parameters, u, x = parameters.contiguous(), u.contiguous(), x.contiguous()
    (B, L, H), N = u.shape, x.shape[-1]
    assert L >= 1
    assert x.shape == (B, H, N)
    assert parameters.shape == (H, 5 * N + 1)
    y, after, states = _forward_shapes(parameters, u, x)
    _call("forward", u, states, parameters, u, x, states, y, after)
    return y, after, states


@_forward.register_fake
def _forward_shapes(parameters: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, L, H = u.shape
    states = u.new_empty(H, B, -(-L // CHUNK) + 1, x.shape[-1])  # before each chunk, and after the last
    return u.new_empty(B, L, H), u.new_empty(x.shape), states


@torch.library.custom_op("sashimi::scan_backward", mutates_args=(), device_types="cpu")
def _backward(parameters: Tensor, u: Tensor, states: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parameters, u, d_y = parameters.contiguous(), u.contiguous(), d_y.contiguous()
    assert d_y.shape == u.shape
    d_parameters, d_u, d_x = _backward_shapes(parameters, u, states, d_y)
    _call("backward", u, states, parameters, u, states, d_y, d_u, d_x, d_parameters)
    return d_parameters, d_u, d_x


@_backward.register_fake
def _backward_shapes(parameters: Tensor, u: Tensor, states: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, H), N = u.shape, states.shape[-1]
    return u.new_empty(parameters.shape), u.new_empty(B, L, H), u.new_empty(B, H, N)
