"""Law 2 of what is carried: a system goes on from a state over any length as it would sample by sample."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from trained_like import relative, trained_like

from sashimi import carry, ssm
from sashimi.s4 import S4

H, N = 5, 8
Tensors = tuple[Tensor, ...]


def system(dtype: torch.dtype = torch.float64, **kind: object) -> Tensors:
    """A, B, C of a layer with weights as after training."""
    torch.manual_seed(0)
    r = trained_like(S4(H, N, **kind).double()).recurrence()  # type: ignore[arg-type]
    return tuple(t.detach().to(dtype) for t in (r.dense(), r.B, r.C))


def signal(length: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """A signal (2, H, length) and a state."""
    torch.manual_seed(length)
    return torch.randn(2, H, length, dtype=dtype), torch.randn(2, H, N, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300, 511, 520])
@pytest.mark.parametrize("block", [1, 8, 64, 128])
def test_recur_is_the_recurrence(length: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any state, at every length about the block's, with odd and even numbers of blocks; so is the last state.

    Mutations: in recur, `driven` from `cols` without the flip; `rows` from C instead of C A; `rest` taken for 0; in
    _states, `+ first` dropped.
    """
    monkeypatch.setattr(carry, "BLOCK", block)
    kind = {"mode": "diag", "kernel": "vandermonde"} if length % 2 else {"tie_state": False}
    for actual, expected in zip(
        carry.recur(*system(**kind), *signal(length)), ssm.scan_reference(*system(**kind), *signal(length)), strict=True
    ):
        assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("split", [1, 63, 64, 65, 150, 199])
def test_recur_continues(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, the second from the first's state, are one. Mutation: in recur, `last @ matrix_power` -> `last`."""
    monkeypatch.setattr(carry, "BLOCK", 32)
    (u, x), matrices = signal(200), system()
    whole, last = carry.recur(*matrices, u, x)
    first, middle = carry.recur(*matrices, u[..., :split], x)
    second, end = carry.recur(*matrices, u[..., split:], middle)
    assert relative(torch.cat((first, second), dim=-1), whole) < 1e-12
    assert relative(end, last) < 1e-12


def test_gradients_are_the_recurrences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the outputs, in the system, the signal and the state before; the state after has none.

    Mutations: in recur, `states` within torch.no_grad(); drop that of `last`.
    """
    monkeypatch.setattr(carry, "BLOCK", 16)

    def gradients(function: Callable[..., Tensors]) -> Tensors:
        inputs = [t.requires_grad_() for t in (*system(), *signal(75))]
        y, last = function(*inputs)
        assert last.requires_grad == (function is ssm.scan_reference)
        return torch.autograd.grad((y * torch.linspace(1, 2, 75)).sum(), inputs)

    for actual, expected in zip(gradients(carry.recur), gradients(ssm.scan_reference), strict=True):
        assert relative(actual, expected) < 1e-11


def test_one_system_may_serve_all_channels() -> None:
    """A and B of one channel, as imported models have them. Mutation: in recur, `torch.bmm` for `@`."""
    (A, B, C), (u, x) = system(), signal(300)
    for actual, expected in zip(
        carry.recur(A[:1], B[:1], C, u, x),
        carry.recur(A[:1].expand(H, -1, -1), B[:1].expand(H, -1), C, u, x),
        strict=True,
    ):
        assert relative(actual, expected) < 1e-12


def test_recur_does_not_drift_in_float32() -> None:
    """Over 100,000 samples in segments the float32 error stays below 1e-4 of the output's maximum, and does not grow.

    Mutation: in _states, `_apply(A, first) + second` -> `… + second.bfloat16()`.
    """
    torch.manual_seed(0)
    s4 = S4(8, 64)
    u = torch.sin(torch.arange(100_000) * (2 * math.pi * 100 / 16_000)).expand(1, 8, -1)
    outputs = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            r, x, played = s4.to(dtype).recurrence(), torch.zeros(1, 8, 64, dtype=dtype), []
            for segment in u.to(dtype).split(16_384, dim=-1):
                y, x = carry.recur(r.dense(), r.B, r.C, segment, x)
                played.append(y.double())
            outputs.append(torch.cat(played, dim=-1))
    single, double = outputs
    assert relative(single[..., :10_000], double[..., :10_000]) < 1e-4
    assert relative(single[..., -10_000:], double[..., -10_000:]) < 1e-4
