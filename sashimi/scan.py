"""The recurrence over a whole signal, in chunks: linear time, matrix products only, from any state on.

Shapes: **B** batch, **L** samples, **H** channels, **N** real state size; chunks of **T** samples, **R** of them a run,
**S** runs. States are rows, so a chunk multiplies them from the right by M, the transpose of A^T:

    y_l = (K ∗ u)_l + C A^{l+1} x in a chunk that begins in state x; the next begins in x M + Σ_l u_l (A^{T−1−l} B)ᵀ

All but the states is one product of all chunks with the same matrices. The states follow from each other in two
levels, as the powers do in `ssm.krylov_kernel`: R steps in all runs at once from zero, S steps from run to run, and
again R steps from where each run truly begins. Gradients are written out, because automatic ones move several times as
much memory. This is the reference of `native.scan`, which stands in for it on CPUs, and serves all else.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sashimi.ssm import KrylovBlocks


def scan(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, u: Tensor, x: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x_{k+1} = A x_k + B u_k, y_k = C x_{k+1} + D u_k from state x, for any L >= 1.

    A (H, N, N), B and C (H, N), D (H,), u (B, L, H), x (B, H, N) -> y (B, L, H) and the state after, (B, H, N), which
    has no gradient: back-propagation ends where it is passed on. None stands for zeros, and gives no state back. A and
    B may have H = 1 for all channels.
    """
    (batch, length, H), N = u.shape, A.shape[-1]
    T = chunk_length(batch * length)
    R = run_length(-(-length // T))
    runs = -(-length // (T * R))
    padding = runs * R * T - length
    A, B = A.expand(H, -1, -1), B.expand(H, -1)
    cols, outs, A_T = KrylovBlocks.apply(A, B, (C.unsqueeze(-2) @ A).squeeze(-2), T)
    kernel = (cols @ C.unsqueeze(-1)).squeeze(-1)
    direct = toeplitz(torch.cat((kernel[:, :1] + D.unsqueeze(-1), kernel[:, 1:]), dim=-1))
    channels = Transpose.apply((F.pad(u, (0, 0, 0, padding)) if padding else u).flatten(0, 1))
    chunks = channels.view(H, batch * runs, R, T).permute(2, 0, 1, 3)
    before = u.new_zeros(H, batch, N) if x is None else x.transpose(0, 1)
    y, *states = Chunks.apply(chunks, before, A_T.mT, cols.flip(1), outs, direct)
    y = y.permute(1, 2, 0, 3).reshape(H, batch, -1)[..., :length].permute(1, 2, 0)
    if x is None:
        return y, None
    with torch.no_grad():
        whole, rest = divmod(length, T)
        run, step = divmod(whole, R)
        last = states[-1] if run == runs else states[step].unflatten(1, (batch, runs))[:, :, run]
        if rest:
            last = last @ torch.linalg.matrix_power(A, rest).mT
            last = last + u[:, -rest:].permute(2, 0, 1) @ cols[:, :rest].flip(1)
    return y, last.transpose(0, 1)


def chunk_length(samples: int) -> int:
    """Samples of a chunk, where so many a channel are to be done: long ones cost more to prepare."""
    return 32 if samples < 1 << 14 else 64 if samples < 1 << 16 else 128


def run_length(chunks: int) -> int:
    """Chunks of a run: few steps, which are 2 R + S, and no padding if that costs no more than half as many again."""
    return min(range(1, chunks + 1), key=lambda R: (2 * R - (-chunks // R)) * (1.5 if chunks % R else 1))


class Transpose(torch.autograd.Function):
    """(rows, columns) -> (columns, rows), copied both ways: with more dimensions torch is ten times as slow at it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> Tensor:
        return d_x.t().contiguous()


class Chunks(torch.autograd.Function):
    """y, (R, H, B·S, T), then R times the states before the steps, (H, B·S, N), and the states after, (H, B, N).

    u (R, H, B·S, T), x (H, B, N), M (H, N, N), cols (H, T, N), outs (H, T, N), direct (H, T, T); all but outs multiply
    rows from the right.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor, M: Tensor, cols: Tensor, outs: Tensor, direct: Tensor
    ) -> tuple[Tensor, ...]:
        u = u.contiguous()
        M_R = torch.linalg.matrix_power(M, len(u))
        states, after = chain([torch.bmm(chunks, cols) for chunks in u], x, M, M_R, reverse=False)
        y = torch.empty_like(u)
        for chunks, state, out in zip(u, states, y, strict=True):
            torch.bmm(chunks, direct, out=out).baddbmm_(state, outs.mT)
        ctx.save_for_backward(u, M, M_R, cols, outs, direct, *states)
        ctx.batch = x.shape[1]
        ctx.mark_non_differentiable(*states, after)
        return y, *states, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        u, M, M_R, cols, outs, direct, *states = ctx.saved_tensors
        d_y = d_y.contiguous()
        nothing = M.new_zeros(len(M), ctx.batch, M.shape[-1])
        d_states = [torch.bmm(d_chunks, outs) for d_chunks in reversed(d_y.unbind())]
        d_after, d_x = chain(d_states, nothing, M.mT, M_R.mT, reverse=True)
        d_u = torch.empty_like(u)
        d_M, d_cols, d_outs, d_direct = (t.new_zeros(t.shape) for t in (M, cols, outs, direct))
        for chunks, state, after, d_chunks, out in zip(u, states, reversed(d_after), d_y, d_u, strict=True):
            torch.bmm(d_chunks, direct.mT, out=out).baddbmm_(after, cols.mT)
            d_M.baddbmm_(state.mT, after)
            d_cols.baddbmm_(chunks.mT, after)
            d_outs.baddbmm_(d_chunks.mT, state)
            d_direct.baddbmm_(chunks.mT, d_chunks)
        return d_u, d_x, d_M, d_cols, d_outs, d_direct


def chain(driven: list[Tensor], start: Tensor, M: Tensor, M_R: Tensor, *, reverse: bool) -> tuple[list[Tensor], Tensor]:
    """The states before each of the R steps x M + driven[r], R times (H, B·S, N), and after all runs, (H, B, N).

    `driven` is R times (H, B·S, N), and is overwritten; `start` (H, B, N) is where the first run begins, and M_R is M
    to the power R. With `reverse` the last run is the first.
    """
    last = driven[0]
    for step in driven[1:]:
        last = torch.baddbmm(step, last, M)
    ends = last.view(*start.shape[:2], -1, start.shape[-1])
    before = torch.empty_like(ends)
    runs = range(ends.shape[2])
    for s in reversed(runs) if reverse else runs:
        before[:, :, s] = start
        start = torch.baddbmm(ends[:, :, s], start, M_R)
    states = [before.view_as(last)]
    for step in driven[:-1]:
        states.append(step.baddbmm_(states[-1], M))
    return states, start


def toeplitz(kernel: Tensor) -> Tensor:
    """The matrix of a causal convolution of rows: M[i, j] = K_{j−i}, 0 below the diagonal. (H, T) -> (H, T, T)."""
    T = kernel.shape[-1]
    # Rows of 2T − 1 cut from repetitions of 2T values: each begins one place earlier in them than the one above.
    repeated = F.pad(kernel, (0, T)).repeat(1, T)
    return repeated[:, : T * (2 * T - 1)].unflatten(-1, (T, -1))[..., :T].contiguous()
