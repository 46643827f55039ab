"""`scan.scan` in compiled code (scan.cpp), on CPUs, for systems that are diagonal or diagonal plus rank one.

Shapes: **B** batch, **L** samples, **H** channels, **N** real state size, **P** modes: N/2, padded to whole vectors.
Signals in compiled code are (H, B, M), M being L rounded up to whole chunks, so that each is read in one piece.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sashimi.native.library import aligned, library, library_or_none
from sashimi.ssm import Recurrence

CHUNK = 64  # samples, as in scan.cpp
_NAMES = {torch.float32: "float", torch.float64: "double"}


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether there is compiled code for this CPU; if not, the reason has been said once."""
    return library_or_none("scan", "state spaces", "-fopenmp") is not None


def scan(system: Recurrence, D: Tensor, u: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x_{k+1} = A x_k + B u_k, y_k = C x_{k+1} + D u_k from state x, on a CPU, in float32 or float64, for any L >= 1.

    D (H,), u (B, L, H), x (B, H, N) or None for zeros -> y (B, L, H) and the state after, which has no gradient, or
    None. Every bit is the same for any number of threads. Raises MemoryError.
    """
    parameters = _parameters(system, D)
    before = u.new_zeros(len(u), len(D), parameters.shape[-1] // 5) if x is None else _padded(x)
    y, after = Scan.apply(parameters, u, before)
    if x is None:
        return y, None
    return y, after.unflatten(-1, (2, -1))[..., : x.shape[-1] // 2].flatten(-2)


def kernel(system: Recurrence, length: int) -> Tensor:
    """K_l = C A^l B for l < length, (H, length), length >= 1, on a CPU, in float32 or float64, from the states A^l B.

    C B is the first, and what the recurrence gives from state B on are the others. Raises MemoryError.
    """
    assert length >= 1, length
    first = (system.C * system.B).sum(-1, keepdim=True)
    if length == 1:
        return first
    parameters = _parameters(system, torch.zeros_like(first[:, 0]))
    return torch.cat((first, Response.apply(parameters, _padded(system.B), length - 1)), dim=-1)


def _parameters(system: Recurrence, D: Tensor) -> Tensor:
    """(H, 10 P + 1): of a channel A's decay, a and b, then B, C, each (2 P), and D."""
    zeros = torch.zeros_like(system.C)
    decay = torch.cat((system.decay_real, system.decay_imag), dim=-1)
    vectors = (decay, *(zeros if v is None else v for v in (system.a, system.b)), system.B, system.C)
    return torch.cat([*map(_padded, vectors), D.unsqueeze(-1)], dim=-1)


def _padded(halves: Tensor) -> Tensor:
    """(..., N), real and imaginary parts, -> (..., 2 P)."""
    padding = -(halves.shape[-1] // 2) % _vector(halves.dtype)
    return F.pad(halves.unflatten(-1, (2, -1)), (0, padding)).flatten(-2) if padding else halves


class Scan(torch.autograd.Function):
    """parameters (H, 10 P + 1), u (B, L, H), x (B, H, 2 P) -> y (B, L, H) and the state after, (B, H, 2 P)."""

    @staticmethod
    def forward(ctx: Any, parameters: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, after, signals, states = _forward(parameters, u, x)
        ctx.save_for_backward(parameters, signals, states)
        ctx.mark_non_differentiable(after)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return _backward(*ctx.saved_tensors, d_y)


class Response(torch.autograd.Function):
    """y_l = C A^{l+1} x for l < length. parameters (H, 10 P + 1), x (H, 2 P) -> (H, length)."""

    @staticmethod
    def forward(ctx: Any, parameters: Tensor, x: Tensor, length: int) -> Tensor:
        y, states = _response(parameters, x, length)
        ctx.save_for_backward(parameters, states)
        return y[:, :length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return *_response_backward(*ctx.saved_tensors, d_y), None


def _library() -> ctypes.CDLL:
    return library("scan", "-fopenmp")


@torch.compiler.assume_constant_result
def _vector(dtype: torch.dtype) -> int:
    """Numbers in a vector."""
    return _library().vector_bytes() // dtype.itemsize


def _call(name: str, sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
    """A function of scan.cpp; sizes are B, L, H and, of the recurrence, P. Raises MemoryError."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert all(tensor.dtype == given[0].dtype and tensor.is_contiguous() for tensor in given)
    function = getattr(_library(), f"{name}_{_NAMES[given[0].dtype]}")
    places = (ctypes.c_void_p(tensor if tensor is None else tensor.data_ptr()) for tensor in tensors)
    if not function(*map(ctypes.c_int64, (*sizes, torch.get_num_threads())), *places):
        raise MemoryError(f"{name} of a state space of {sizes[2]} channels and {2 * sizes[3]} states")


@torch.library.custom_op("sashimi::scan", mutates_args=(), device_types="cpu")
def _forward(parameters: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters, u, x = parameters.contiguous(), u.contiguous(), x.contiguous()
    (B, L, H), N = u.shape, x.shape[-1]
    assert L >= 1
    assert x.shape == (B, H, N)
    assert parameters.shape == (H, 5 * N + 1)
    y, after, signals, states = _forward_shapes(parameters, u, x)
    outputs = torch.empty_like(signals)
    _call("to_signals", (B, L, H), u, signals)
    _call("forward", (B, L, H, N // 2), parameters, signals, x, states, outputs, after)
    _call("from_signals", (B, L, H), outputs, y)
    return y, after, signals, states


@_forward.register_fake
def _forward_shapes(parameters: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, L, H), chunks = u.shape, -(-u.shape[1] // CHUNK)
    signals = u.new_empty(H, B, chunks * CHUNK)
    states = u.new_empty(H, B, chunks + 1, x.shape[-1])  # before each chunk, and after the last
    return u.new_empty(B, L, H), u.new_empty(x.shape), signals, states


@torch.library.custom_op("sashimi::scan_backward", mutates_args=(), device_types="cpu")
def _backward(parameters: Tensor, signals: Tensor, states: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parameters, d_y = parameters.contiguous(), d_y.contiguous()
    signals, states = aligned(signals), aligned(states)
    (B, L, H), N = d_y.shape, states.shape[-1]
    d_parameters, d_u, d_x = _backward_shapes(parameters, signals, states, d_y)
    d_outputs, d_signals = torch.empty_like(signals), torch.empty_like(signals)
    _call("to_signals", (B, L, H), d_y, d_outputs)
    tensors = (parameters, signals, states, d_outputs, d_signals, d_x, d_parameters)
    _call("backward", (B, L, H, N // 2), *tensors)
    _call("from_signals", (B, L, H), d_signals, d_u)
    return d_parameters, d_u, d_x


@_backward.register_fake
def _backward_shapes(parameters: Tensor, signals: Tensor, states: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, H), N = d_y.shape, states.shape[-1]
    return d_y.new_empty(parameters.shape), d_y.new_empty(B, L, H), d_y.new_empty(B, H, N)


@torch.library.custom_op("sashimi::response", mutates_args=(), device_types="cpu")
def _response(parameters: Tensor, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    parameters, x = parameters.contiguous(), x.contiguous()
    y, states = _response_shapes(parameters, x, length)
    _call("forward", (1, length, len(x), x.shape[-1] // 2), parameters, None, x, states, y, None)
    return y, states


@_response.register_fake
def _response_shapes(parameters: Tensor, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    (H, N), chunks = x.shape, -(-length // CHUNK)
    return x.new_empty(H, chunks * CHUNK), x.new_empty(H, chunks + 1, N)


@torch.library.custom_op("sashimi::response_backward", mutates_args=(), device_types="cpu")
def _response_backward(parameters: Tensor, states: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    parameters, states = parameters.contiguous(), aligned(states)
    (H, length), N = d_y.shape, states.shape[-1]
    d_parameters, d_x = _response_backward_shapes(parameters, states, d_y)
    d_signals = d_y.new_zeros(H, -(-length // CHUNK) * CHUNK)
    d_signals[:, :length] = d_y
    _call("backward", (1, length, H, N // 2), parameters, None, states, d_signals, None, d_x, d_parameters)
    return d_parameters, d_x


@_response_backward.register_fake
def _response_backward_shapes(parameters: Tensor, states: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return d_y.new_empty(parameters.shape), d_y.new_empty(len(d_y), states.shape[-1])
