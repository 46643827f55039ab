"""The system from a state on, over a signal of any length: what lets a recording be played in consecutive segments.

Shapes: **B** batch, **L** samples, **H** channels, **N** real state size, as in `ssm`; blocks of **T** samples.
Within a block that begins in state x, and from it to the next one:

    y_l = (K ∗ u)_l + C A^{l+1} x        x' = A^T x + Σ_l A^{T−1−l} B u_l

The blocks' states come from each other, by a scan whose depth is the logarithm of their number. All else is batched
matrix products over all blocks at once; the cost is linear in L.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sashimi.ssm import krylov_block

BLOCK = 128  # samples: about where the products below are cheapest together for 64 states


def recur(A: Tensor, B: Tensor, C: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence from state x on: y and the state after, as of `ssm.scan_reference`, for any length L >= 1.

    A (H, N, N), B and C (H, N), u (B, H, L), x (B, H, N) -> y (B, H, L), last x (B, H, N). Differentiable, but for the
    last state: back-propagation is truncated where a state is passed on. A and B may have H = 1 for all channels.
    """
    length = u.shape[-1]
    T = min(BLOCK, 1 << math.ceil(math.log2(length)))
    whole, rest = divmod(length, T)
    cols, A_T = krylov_block(A, B, T)  # A^l B: (H, N, T)
    rows, _ = krylov_block(A.mT, (C.unsqueeze(-2) @ A).squeeze(-2), T)  # (C A^{l+1})ᵀ: (H, N, T)
    kernel = (C.unsqueeze(-2) @ cols).squeeze(-2)  # (H, T)
    blocks = F.pad(u, (0, -length % T)).unflatten(-1, (-1, T)).permute(1, 0, 2, 3).flatten(1, 2)  # (H, B·n, T)
    driven = (blocks @ cols.flip(-1).mT).unflatten(1, (len(u), -1))  # (H, B, n, N)
    states = _states(A_T.mT, driven[:, :, :whole], x.transpose(0, 1).unsqueeze(-2))
    before = states[:, :, : driven.shape[2]].flatten(1, 2)  # of each block: (H, B·n, N)
    y = blocks @ _toeplitz(kernel) + before @ rows
    y = y.unflatten(1, (len(u), -1)).flatten(-2)[..., :length].transpose(0, 1)
    with torch.no_grad():
        last = states[:, :, -1]  # (H, B, N)
        if rest:
            tail = u[..., -rest:].transpose(0, 1)
            last = last @ torch.linalg.matrix_power(A, rest).mT + tail @ cols[..., :rest].flip(-1).mT
    return y, last.transpose(0, 1).contiguous()


def _states(A: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """x_0 = x and x_{i+1} = x_i A + v_i: A (H, N, N), v (H, B, n, N), x (H, B, 1, N) -> (H, B, n + 1, N).

    Two steps are one by A², so half of the states are those of half as many steps, and the others one step further.
    """
    n = v.shape[2]
    if n == 0:
        return x
    if n % 2:
        states = _states(A, v[:, :, :-1], x)
        return torch.cat((states, _apply(A, states[:, :, -1:]) + v[:, :, -1:]), dim=2)
    first, second = v[:, :, 0::2], v[:, :, 1::2]
    even = _states(A @ A, _apply(A, first) + second, x)
    odd = _apply(A, even[:, :, :-1]) + first
    return torch.cat((torch.stack((even[:, :, :-1], odd), dim=3).flatten(2, 3), even[:, :, -1:]), dim=2)


def _apply(A: Tensor, x: Tensor) -> Tensor:
    """x A of each channel: A (H or 1, N, N), x (H, B, n, N) -> (H, B, n, N)."""
    return (x.flatten(1, 2) @ A).unflatten(1, x.shape[1:3])


def _toeplitz(kernel: Tensor) -> Tensor:
    """M[i, j] = K_{j−i}, 0 below the diagonal, so that u M is the causal convolution: (H, T) -> (H, T, T)."""
    T = kernel.shape[-1]
    # Rows of 2T − 1 cut from repetitions of 2T values: each begins one place earlier in them than the one above.
    repeated = F.pad(kernel, (0, T)).repeat(1, T)
    return repeated[:, : T * (2 * T - 1)].unflatten(-1, (T, -1))[..., :T]
