"""The S4 layer's state space: parameters, the whole sequence by convolution or in chunks, one sample by recurrence.

Shapes: **B** batch, **L** samples, **H** channels, **N** state, **S** copies of the shared parameters (1 or H).
Complex parameters are stored as trailing (real, imaginary) pairs, because mixed-precision frameworks drop
imaginary parts; every computation here is float32 or float64 whatever autocast says.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sashimi import ssm
from sashimi.native import scan as native
from sashimi.scan import scan

Made = Tensor | ssm.Recurrence  # a layer's kernel, or its discrete system


class S4State(NamedTuple):
    """The recurrent state, with the discretized system (as of `init_state`) by which `step` goes on from it."""

    x: Tensor  # (B, H, N)
    recurrence: ssm.Recurrence


def in_chunks(device: torch.device) -> bool:
    """Whether the recurrence goes in chunks where it could as well be a convolution with a kernel of the whole length.

    A GPU has few large FFTs done before it has begun with so many small products.
    """
    return device.type == "cpu"


class Parameters(NamedTuple):
    """What a system is computed from."""

    log_A_real: Tensor  # (S, N/2)
    A_imag: Tensor  # (S, N/2)
    P: Tensor | None  # (S, N/2, 2)
    B: Tensor  # (S, N/2, 2)
    C: Tensor  # (H, N/2, 2)
    log_dt: Tensor  # (H,)

    def system(self, dt_transform: str) -> ssm.System:
        """The continuous system in complex numbers."""
        P = None if self.P is None else torch.view_as_complex(self.P)
        return ssm.System(
            Lambda=torch.complex(-torch.exp(self.log_A_real), self.A_imag),
            P=P,
            Q=P,
            B=torch.view_as_complex(self.B),
            C=torch.view_as_complex(self.C),
            dt=ssm.time_step(self.log_dt, dt_transform),
        )


class S4(nn.Module):
    """y = K ∗ u + D u with K the kernel of a HiPPO-initialized state space, one a channel.

    `tie_state` shares A, P and B between channels (n_ssm = 1 of the original); C, D and dt are a channel's own.
    Stable by construction: Re Lambda = −exp(log_A_real), Q = P. Source: SaShiMi (arXiv 2202.09729) section 4.2.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        tie_state: bool = True,
        mode: str = "dplr",
        dt_transform: str = "exp",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        kernel: str = "krylov",
    ) -> None:
        super().__init__()
        self.kernel_name, self.dt_transform = kernel, dt_transform
        Lambda, P, B = ssm.hippo_legs(d_state)
        copies = 1 if tie_state else d_model

        def pairs(z: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.view_as_real(z).float().repeat(copies, 1, 1))

        self.log_A_real = nn.Parameter(torch.log(-Lambda.real).float().repeat(copies, 1))  # (S, N/2)
        self.A_imag = nn.Parameter(Lambda.imag.float().repeat(copies, 1))  # (S, N/2)
        self.P = pairs(P) if mode == "dplr" else None  # (S, N/2, 2)
        self.B = pairs(B)  # (S, N/2, 2)
        self.C = nn.Parameter(torch.randn(d_model, d_state // 2, 2) * math.sqrt(0.5))  # (H, N/2, 2)
        self.D = nn.Parameter(torch.randn(d_model))
        log_dt = math.log(dt_min) + torch.rand(d_model) * (math.log(dt_max) - math.log(dt_min))
        raw = log_dt if dt_transform == "exp" else ssm.softplus_inverse(log_dt.exp())
        self.log_dt = nn.Parameter(raw)  # (H,) dt before exp or softplus

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "S4":
        """Follow `.to()` everywhere but below float32: `model.bfloat16()` must not round A, dt or C."""

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep_precision, recurse)

    def system(self) -> ssm.System:
        """The continuous system in complex numbers."""
        return self._parameters_of_system().system(self.dt_transform)

    def _parameters_of_system(self) -> Parameters:
        return Parameters(self.log_A_real, self.A_imag, self.P, self.B, self.C, self.log_dt)

    def recurrence(self) -> ssm.Recurrence:
        """The discrete system in real numbers."""
        return ssm.discretize(self.system())

    def kernel(self, length: int) -> Tensor:
        """K: (H, length), by the algorithm this layer was given."""
        if self.kernel_name.startswith("cauchy"):
            return ssm.cauchy_kernel(self.system(), length, keops=self.kernel_name == "cauchy_keops")
        return _kernel(self.kernel_name, self.recurrence(), length)

    def forward(
        self, u: Tensor, state: S4State | None = None, made: Made | None = None
    ) -> tuple[Tensor, S4State | None]:
        """u: (B, L, H) -> y (B, L, H) in u's dtype, and the state after the last sample if one was given.

        The system is that of the parameters now, not of the state, which is taken and returned without a gradient.
        `made` is what `make` has made for this.
        """
        with torch.autocast(u.device.type, enabled=False):
            u32 = u.to(self.D.dtype)
            if state is None and self.convolves():
                K = self.kernel(u.shape[1]) if made is None else made
                assert isinstance(K, Tensor)
                y = ssm.causal_convolution(u32.mT, K, self.D).mT
            else:
                r = self.recurrence() if made is None else made
                assert isinstance(r, ssm.Recurrence)
                y, x = _scan(r, self.D, u32, state and state.x)
                state = state and S4State(x, state.recurrence)  # type: ignore[arg-type]
        return y.to(u.dtype), state

    def convolves(self) -> bool:
        """Whether `forward` without a state is a convolution with a kernel of the whole length."""
        return not (self.kernel_name == "krylov" and in_chunks(self.D.device))

    def step(self, u: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """One sample of `forward`. u: (B, H) -> y (B, H)."""
        with torch.autocast(u.device.type, enabled=False):
            u32 = u.to(self.D.dtype)
            y, x = state.recurrence.step(u32, state.x)
            y = torch.addcmul(y, self.D, u32)
        return y.to(u.dtype), S4State(x, state.recurrence)

    def init_state(self, batch_size: int) -> S4State:
        """The state of silence before a recording: zeros, on the parameters' device."""
        recurrence = self.recurrence()
        H, N = recurrence.C.shape
        return S4State(recurrence.C.new_zeros(batch_size, H, N), recurrence)


def make(layers: Sequence[S4], length: int, carried: bool) -> list[Made | None]:
    """What `forward` makes of the parameters alone, for layers of one size as one; None where a layer makes it itself.

    Their kernels, (H, length) each, or, where a state is carried or they go in chunks, their discrete systems. What
    they take is small: to begin so many operations for each layer would cost more than to do them.
    """
    first = layers[0]
    whole = first.convolves() and not carried
    if {type(s) for s in layers} != {S4} or (whole and first.kernel_name.startswith("cauchy")):
        return [None] * len(layers)
    H = len(first.D)

    def joined(parts: tuple[Tensor, ...]) -> Tensor:
        stacked = torch.stack(parts)  # (layers, S, …)
        return stacked.expand(-1, H, *stacked.shape[2:]).flatten(0, 1)

    with torch.autocast(first.D.device.type, enabled=False):
        parts = zip(*(s._parameters_of_system() for s in layers), strict=True)
        parameters = Parameters(*(None if part[0] is None else joined(part) for part in parts))  # type: ignore[arg-type]
        recurrence = ssm.discretize(parameters.system(first.dt_transform))
        if whole:
            return list(_kernel(first.kernel_name, recurrence, length).split(H))
        each = ([None] * len(layers) if part is None else part.split(H) for part in recurrence)
        return [ssm.Recurrence(*of_layer) for of_layer in zip(*each, strict=True)]


def _scan(r: ssm.Recurrence, D: Tensor, u: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return native.scan(r, D, u, x) if _has_compiled_code(r) else scan(r.dense(), r.B, r.C, D, u, x)


def _kernel(name: str, recurrence: ssm.Recurrence, length: int) -> Tensor:
    if name == "vandermonde":
        return ssm.vandermonde_kernel(recurrence, length)
    if _has_compiled_code(recurrence):
        return native.kernel(recurrence, length)
    return ssm.krylov_kernel(recurrence.dense(), recurrence.B, recurrence.C, length)


def _has_compiled_code(recurrence: ssm.Recurrence) -> bool:
    """On CPUs, if it is of exactly this kind: A may be another matrix in a subclass."""
    return type(recurrence) is ssm.Recurrence and in_chunks(recurrence.B.device) and native.is_available()
