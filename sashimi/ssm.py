"""The mathematics of the S4 layer as pure functions: HiPPO, discretization, kernels, convolution, reference scan.

Shapes: **B** batch, **L** samples, **H** channels, **N** real state size. A system of N real states is stored as
N/2 complex modes, one of each conjugate pair, and its real coordinates are x = [Re z, Im z].
Continuous system (S4, arXiv 2111.00396; stable form: SaShiMi, arXiv 2202.09729, section 4.2):

    z' = Lambda z − P · 2 Re(Q* z) + B u,    y = 2 Re(C z)          (Q = P in the stable form)

Discrete convention: x_{k+1} = A x_k + B u_k, y_k = C x_{k+1}, so the kernel is K_l = C A^l B.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class System(NamedTuple):
    """A continuous system, one a channel; tensors of shared ("tied") parameters have H = 1."""

    Lambda: Tensor  # (H or 1, N/2) complex, Re < 0 when stable
    P: Tensor | None  # (H or 1, N/2) complex; None: diagonal (S4D)
    Q: Tensor | None  # (H or 1, N/2) complex
    B: Tensor  # (H or 1, N/2) complex
    C: Tensor  # (H, N/2) complex
    dt: Tensor  # (H,) time step


class Recurrence(NamedTuple):
    """The discrete system in real arithmetic: A = rotation(decay) − a bᵀ, O(N) a channel and step."""

    decay_real: Tensor  # (H, N/2)
    decay_imag: Tensor  # (H, N/2)
    a: Tensor | None  # (H, N); None: diagonal
    b: Tensor | None  # (H, N)
    B: Tensor  # (H, N)
    C: Tensor  # (H, N)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One sample. u: (B, H), x: (B, H, N) -> y (B, H), next x (B, H, N)."""
        re, im = x.chunk(2, dim=-1)
        # A GPU takes as long as it takes to launch these small kernels: addcmul is one instead of two.
        next_re = torch.addcmul(self.decay_real * re, self.decay_imag, im, value=-1)
        next_im = torch.addcmul(self.decay_real * im, self.decay_imag, re)
        rotated = torch.cat((next_re, next_im), dim=-1)
        if self.a is not None and self.b is not None:
            rotated = torch.addcmul(rotated, self.a, (self.b * x).sum(-1, keepdim=True), value=-1)
        x = torch.addcmul(rotated, self.B, u.unsqueeze(-1))
        return (self.C * x).sum(-1), x

    def dense(self) -> Tensor:
        """The matrix A: (H, N, N)."""
        re, im = torch.diag_embed(self.decay_real), torch.diag_embed(self.decay_imag)
        A = torch.cat((torch.cat((re, -im), dim=-1), torch.cat((im, re), dim=-1)), dim=-2)
        if self.a is not None and self.b is not None:
            A = A - self.a.unsqueeze(-1) * self.b.unsqueeze(-2)
        return A


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as normal plus low rank, diagonalized: Lambda, P, B, each (d_state/2,) complex128.

    The matrix A + P Pᵀ with P = √(n + ½) has the symmetric part −½ I, so its skew part has a unitary
    eigenbasis (S4, theorem 1 and appendix C); one of each conjugate pair is kept.
    """
    n = torch.arange(d_state, dtype=torch.float64)
    scale = torch.sqrt(2 * n + 1)
    A = -torch.tril(scale[:, None] * scale[None, :], diagonal=-1) - torch.diag(n + 1)
    P = torch.sqrt(n + 0.5)
    normal = A + P[:, None] * P[None, :]
    skew = normal + 0.5 * torch.eye(d_state, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    frequency = frequency[d_state // 2 :]  # ascending and symmetric about zero: the upper half is positive
    basis = V[:, d_state // 2 :].mH
    Lambda = torch.complex(torch.full_like(frequency, -0.5), frequency)
    return Lambda, basis @ P.to(basis.dtype), basis @ scale.to(basis.dtype)


def real_vector(z: Tensor) -> Tensor:
    """A vector of modes in real coordinates: (..., N/2) complex -> (..., N)."""
    return torch.cat((z.real, z.imag), dim=-1)


def real_functional(c: Tensor) -> Tensor:
    """The real row vector r with r·[Re z, Im z] = 2 Re(c z): (..., N/2) complex -> (..., N)."""
    return torch.cat((2 * c.real, -2 * c.imag), dim=-1)


def discretize(system: System) -> Recurrence:
    """Bilinear discretization in Woodbury form, without a matrix inverse.

    With X = dt/2 · (Lambda − P Q*), G = (1 − dt/2 · Lambda)⁻¹ and R = (1 − X)⁻¹ = G − κ·dt/2 · (G P)(Q* G):
    A = R (1 + X) = 2 R − 1 and B = dt · R B.
    """
    dt = system.dt.unsqueeze(-1)
    G = 1 / (1 - 0.5 * dt * system.Lambda)
    decay = 2 * G - 1
    C = real_functional(system.C)
    if system.P is None or system.Q is None:
        B = real_vector(dt * G * system.B)
        return Recurrence(decay.real, decay.imag, None, None, B, C)
    GP = real_vector(G * system.P)
    b = real_functional(system.Q.conj() * G)
    P_real, B_real = real_vector(system.P), real_vector(system.B)
    kappa = 1 / (1 + 0.5 * dt * (b * P_real).sum(-1, keepdim=True))
    a = dt * kappa * GP
    B = dt * real_vector(G * system.B) - 0.5 * dt * a * (b * B_real).sum(-1, keepdim=True)
    return Recurrence(decay.real, decay.imag, a, b, B, C)


# --- kernels: K_l = C A^l B for l < length -----------------------------------------------------------------


def naive_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """The definition, one power at a time: the reference of every other kernel. -> (H, length)."""
    x, kernel = B, []
    for _ in range(length):
        kernel.append((C * x).sum(-1))
        x = (A @ x.unsqueeze(-1)).squeeze(-1)
    return torch.stack(kernel, dim=-1)


class KrylovBlocks(torch.autograd.Function):
    """B, A B, …, A^{width−1} B and C, C A, …, C A^{width−1}, each (H, width, N), and A^width, by doubling.

    A (H, N, N), B (H, N) or None for no such block, C likewise; `width` is a power of two. Gradients are written out,
    because automatic ones keep, and move, several times as much memory.
    """

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor | None, C: Tensor | None, width: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        assert width & (width - 1) == 0, width
        blocks = [None if v is None else v.new_empty(v.shape[0], width, v.shape[1]) for v in (B, C)]
        for block, first in zip(blocks, (B, C), strict=True):
            if block is not None and first is not None:
                block[:, 0] = first
        cols, outs = blocks
        powers = [A]
        for k in range(width.bit_length() - 1):
            lower, upper = slice(0, 1 << k), slice(1 << k, 2 << k)
            if cols is not None:
                cols[:, upper] = cols[:, lower] @ powers[k].mT
            if outs is not None:
                outs[:, upper] = outs[:, lower] @ powers[k]
            powers.append(powers[k] @ powers[k])
        ctx.save_for_backward(cols, outs, *powers[:-1])
        ctx.set_materialize_grads(False)
        return cols, outs, powers[-1]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_cols: Tensor | None, d_outs: Tensor | None, d_power: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        cols, outs, *powers = ctx.saved_tensors
        d_cols, d_outs = (None if d is None else d.clone() for d in (d_cols, d_outs))
        for k, power in reversed(list(enumerate(powers))):
            lower, upper = slice(0, 1 << k), slice(1 << k, 2 << k)
            if d_power is None:
                d_power = torch.zeros_like(power)
            else:
                d_power = torch.baddbmm(d_power @ power.mT, power.mT, d_power)
            if d_cols is not None:
                d_power.baddbmm_(d_cols[:, upper].mT, cols[:, lower])
                d_cols[:, lower] += d_cols[:, upper] @ power
            if d_outs is not None:
                d_power.baddbmm_(outs[:, lower].mT, d_outs[:, upper])
                d_outs[:, lower] += d_outs[:, upper] @ power.mT
        return d_power, None if d_cols is None else d_cols[:, 0], None if d_outs is None else d_outs[:, 0], None


def krylov_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Two thin Krylov blocks and one matrix product: exact powers, any length. -> (H, length).

    With l = s·i + j: K_l = (C A^{s i}) · (A^j B), s ≈ √length. A (H or 1, N, N), B (H or 1, N) and C (H, N).
    """
    s = 1 << math.ceil(math.log2(length) / 2)
    n_rows = 1 << math.ceil(math.log2(-(-length // s)))
    cols, _, A_s = KrylovBlocks.apply(A.expand(len(C), -1, -1), B.expand_as(C), None, s)
    _, rows, _ = KrylovBlocks.apply(A_s, None, C, n_rows)
    return (rows @ cols.mT).flatten(-2)[:, :length]


def vandermonde_kernel(recurrence: Recurrence, length: int) -> Tensor:
    """`krylov_kernel` of a diagonal A (S4D, arXiv 2206.11893): two small Vandermonde blocks. -> (H, length)."""
    assert recurrence.a is None
    decay = torch.complex(recurrence.decay_real, recurrence.decay_imag)
    s = 1 << math.ceil(math.log2(length) / 2)
    B_re, B_im = recurrence.B.chunk(2, dim=-1)
    cols, decay_s = _diagonal_block(decay, torch.complex(B_re, B_im), s)
    C_re, C_im = recurrence.C.chunk(2, dim=-1)
    n_rows = 1 << math.ceil(math.log2(-(-length // s)))
    rows, _ = _diagonal_block(decay_s, torch.complex(C_re, -C_im), n_rows)
    rows_real = torch.cat((rows.real, -rows.imag), dim=-2)
    cols_real = torch.cat((cols.real, cols.imag), dim=-2)
    return (rows_real.mT @ cols_real).flatten(-2)[:, :length]


def _diagonal_block(decay: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor]:
    block = v.unsqueeze(-1)
    while block.shape[-1] < width:
        block = torch.cat((block, decay.unsqueeze(-1) * block), dim=-1)
        decay = decay * decay
    return block, decay


def cauchy_kernel(system: System, length: int, *, keops: bool = False) -> Tensor:
    """The paper's method: the truncated generating function at the roots of unity, then an inverse FFT.

    S4, algorithm 1, multiplied through by (1 + ω) so that no node is infinite: with m = 1 − ω, p = 1 + ω,
    w = dt/2 · Lambda and C̃ = C (1 − A^length), K̂(ω) = dt · C̃ (m − p (w − dt/2 · P Q*))⁻¹ B, by Woodbury from four
    Cauchy sums. Plain torch needs O(N·length) memory a channel; with `keops` the sums are fused. -> (H, length).
    """
    recurrence = discretize(system)
    C_row = recurrence.C.unsqueeze(-2)
    C_re, C_im = (C_row - C_row @ torch.linalg.matrix_power(recurrence.dense(), length)).squeeze(-2).chunk(2, -1)
    C = torch.complex(0.5 * C_re, -0.5 * C_im)
    angle = -2 * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64, device=C.device)
    omega = torch.polar(torch.ones_like(angle), angle)
    m, p = (1 - omega).to(C.dtype), (1 + omega).to(C.dtype)
    half_dt = 0.5 * system.dt.unsqueeze(-1)
    w = half_dt * system.Lambda

    def cauchy(v: Tensor) -> Tensor:
        if keops:
            from sashimi.keops import cauchy_sum

            return cauchy_sum(v.expand_as(w), w, m, p)
        return cauchy_sum_plain(v, w, m, p)

    if system.P is None or system.Q is None:
        spectrum = cauchy(C * system.B)
    else:
        CB, CP = cauchy(C * system.B), cauchy(C * system.P)
        QB, QP = cauchy(system.Q.conj() * system.B), cauchy(system.Q.conj() * system.P)
        spectrum = CB - CP * QB * (p * half_dt) / (1 + p * half_dt * QP)
    return torch.fft.irfft(2 * half_dt * spectrum, n=length)


def cauchy_sum_plain(v: Tensor, w: Tensor, m: Tensor, p: Tensor) -> Tensor:
    """Σ_n v_n/(m − p w_n) + v̄_n/(m − p w̄_n). v, w: (H, N/2), m, p: (M,) complex -> (H, M)."""
    m, p = m[:, None], p[:, None]
    v, w = v[:, None, :], w[:, None, :]
    return (v / (m - p * w) + v.conj() / (m - p * w.conj())).sum(-1)


# --- applying a system to a signal -------------------------------------------------------------------------


def fft_length(n: int) -> int:
    """The smallest length 2^a·{1, 3, 5, 9, 15} of at least n, all of them fast transforms."""
    return min(k << max(0, math.ceil(math.log2(n / k))) for k in (1, 3, 5, 9, 15))


class Convolution(torch.autograd.Function):
    """`causal_convolution`, with gradients by real transforms; automatic ones take complex ones, which cost twice."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
        n = fft_length(2 * u.shape[-1] - 1)
        signal, response = torch.fft.rfft(u, n=n), torch.fft.rfft(kernel, n=n) + D.unsqueeze(-1)
        ctx.save_for_backward(signal, response)
        ctx.n = n
        return torch.fft.irfft(signal * response, n=n)[..., : u.shape[-1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        signal, response = ctx.saved_tensors
        d_spectrum = torch.fft.rfft(d_y, n=ctx.n)
        d_u = torch.fft.irfft(d_spectrum * response.conj(), n=ctx.n)[..., : d_y.shape[-1]]
        d_response = (d_spectrum * signal.conj()).reshape(-1, *response.shape).sum(0)
        d_kernel = torch.fft.irfft(d_response, n=ctx.n)[..., : d_y.shape[-1]]
        return d_u, d_kernel, d_kernel[..., 0].clone()  # else all of the memory would be kept for it


def causal_convolution(u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
    """y_t = Σ_{l ≤ t} K_l u_{t−l} + D u_t by FFT, to whose flat spectrum D adds as K_0 does.

    u: (..., H, L), kernel: (H, L) float32 or float64, D: (H,) -> (..., H, L).
    """
    return Convolution.apply(u, kernel, D)


def scan_reference(A: Tensor, B: Tensor, C: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, one sample at a time. u: (B, H, L), x: (B, H, N) -> y (B, H, L), last x."""
    outputs = []
    for t in range(u.shape[-1]):
        x = (A @ x.unsqueeze(-1)).squeeze(-1) + B * u[..., t, None]
        outputs.append((C * x).sum(-1))
    return torch.stack(outputs, dim=-1), x


def softplus_inverse(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))


def time_step(raw: Tensor, transform: str) -> Tensor:
    """The step dt > 0 from its unconstrained parameter: "exp" or "softplus"."""
    return torch.exp(raw) if transform == "exp" else F.softplus(raw)
