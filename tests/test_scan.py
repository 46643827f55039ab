"""Laws 1 and 2 of the recurrence in chunks: from any state, over any length, it is the recurrence sample by sample."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from trained_like import relative, trained_like

import sashimi.scan as chunked
from sashimi import ssm
from sashimi.s4 import S4
from sashimi.scan import scan, toeplitz

H, N = 5, 8
Tensors = tuple[Tensor, ...]


def system(**kind: object) -> Tensors:
    """A, B, C, D of a layer with weights as after training."""
    torch.manual_seed(0)
    s4 = trained_like(S4(H, N, **kind).double())  # type: ignore[arg-type]
    r = s4.recurrence()
    return tuple(t.detach() for t in (r.dense(), r.B, r.C, s4.D))


def signal(length: int) -> Tensors:
    """A signal (2, length, H) and a state."""
    torch.manual_seed(length)
    return torch.randn(2, length, H, dtype=torch.float64), torch.randn(2, H, N, dtype=torch.float64)


def reference(A: Tensor, B: Tensor, C: Tensor, D: Tensor, u: Tensor, x: Tensor) -> Tensors:
    y, last = ssm.scan_reference(A, B, C, u.mT, x)
    return y.mT + D * u, last


@pytest.fixture(params=[1, 8, 64])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of so many samples."""
    monkeypatch.setattr(chunked, "chunk_length", lambda samples: request.param)
    return request.param


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300, 511, 520])
def test_scan_is_the_recurrence(length: int, chunk: int) -> None:
    """From any state, for whole and broken chunks and runs; so is the last state.

    Mutations: `cols.flip(1)` -> `cols` in either place; in KrylovBlocks.apply, C for C A; `rest` taken for 0; M_R -> M
    in chain; D left out.
    """
    kind = {"mode": "diag", "kernel": "vandermonde"} if length % 2 else {"tie_state": False}
    inputs = *system(**kind), *signal(length)
    for actual, expected in zip(scan(*inputs), reference(*inputs), strict=True):
        assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("length", [1, 31, 64, 1000])
def test_scan_from_silence_is_the_convolution_with_the_kernel(length: int) -> None:
    """What a GPU computes by a kernel of the whole length and FFTs. Mutation: `R` of scan plus 1 in `chunks`."""
    A, B, C, D = system()
    u, _ = signal(length)
    expected = ssm.causal_convolution(u.mT, ssm.krylov_kernel(A, B, C, length), D).mT
    assert relative(scan(A, B, C, D, u)[0], expected) < 1e-12


@pytest.mark.parametrize("split", [1, 63, 64, 65, 150, 199])
@pytest.mark.usefixtures("chunk")
def test_scan_continues(split: int) -> None:
    """Two of them, the second from the first's state, are one. Mutation: `last @ matrix_power` -> `last`."""
    (u, x), matrices = signal(200), system()
    whole, last = scan(*matrices, u, x)
    first, middle = scan(*matrices, u[:, :split], x)
    second, end = scan(*matrices, u[:, split:], middle)
    assert relative(torch.cat((first, second), dim=1), whole) < 1e-12
    assert relative(end, last) < 1e-12


@pytest.mark.parametrize("length", [5, 75, 128])
@pytest.mark.usefixtures("chunk")
def test_gradients_are_the_recurrences(length: int) -> None:
    """Of the outputs, in the system, the signal and the state before; the state after has none.

    Mutations: any of the five products of Chunks.backward or of the six of KrylovBlocks.backward left out;
    `reverse=False`.
    """

    def gradients(function: Callable[..., Tensors]) -> Tensors:
        inputs = [t.requires_grad_() for t in (*system(), *signal(length))]
        y, last = function(*inputs)
        assert last.requires_grad == (function is reference)
        return torch.autograd.grad((y * torch.linspace(1, 2, length).unsqueeze(-1)).sum(), inputs)

    for actual, expected in zip(gradients(scan), gradients(reference), strict=True):
        assert relative(actual, expected) < 1e-11


def test_one_system_may_serve_all_channels() -> None:
    """A and B of one channel, as imported models have them. Mutation: no `expand`."""
    (A, B, C, D), (u, x) = system(), signal(300)
    each = (A[:1].expand(H, -1, -1), B[:1].expand(H, -1), C, D, u, x)
    for actual, expected in zip(scan(A[:1], B[:1], C, D, u, x), scan(*each), strict=True):
        assert relative(actual, expected) < 1e-12


def test_toeplitz_is_a_convolution() -> None:
    """Row i holds the kernel from column i on. Mutation: `T * (2 * T - 1)` -> `T * (2 * T)`, cut in rows of 2 T."""
    kernel = torch.arange(1.0, 5)[None]
    expected = [[1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 1]]
    assert toeplitz(kernel)[0].tolist() == expected


def test_scan_does_not_drift_in_float32() -> None:
    """Over 100,000 samples in segments the float32 error stays below 1e-4 of the output's maximum, and does not grow.

    Mutation: in chain, `step` -> `step.bfloat16().float()`.
    """
    torch.manual_seed(0)
    s4 = S4(8, 64)
    u = torch.sin(torch.arange(100_000) * (2 * math.pi * 100 / 16_000)).expand(8, 1, -1).permute(1, 2, 0)
    outputs = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            r, x, played = s4.to(dtype).recurrence(), torch.zeros(1, 8, 64, dtype=dtype), []
            for segment in u.to(dtype).split(16_384, dim=1):
                y, x = scan(r.dense(), r.B, r.C, s4.D, segment, x)
                played.append(y.double())
            outputs.append(torch.cat(played, dim=1))
    single, double = outputs
    assert relative(single[:, :10_000], double[:, :10_000]) < 1e-4
    assert relative(single[:, -10_000:], double[:, -10_000:]) < 1e-4
