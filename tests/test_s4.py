"""Laws 2, 5 and 6 of one S4 layer, and how it starts."""

import math
from collections.abc import Sequence

import pytest
import torch
from precision import watched
from torch import Tensor
from trained_like import relative, trained_like

from sashimi import ssm
from sashimi.s4 import S4, Made, make

H, N = 6, 8

KINDS = {
    "tied": {},
    "untied": {"tie_state": False},
    "softplus": {"dt_transform": "softplus"},
    "diagonal": {"mode": "diag", "kernel": "vandermonde"},
    "diagonal untied softplus": {
        "mode": "diag",
        "kernel": "vandermonde",
        "tie_state": False,
        "dt_transform": "softplus",
    },
    "cauchy": {"kernel": "cauchy"},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def layer(kind: str = "tied", dtype: torch.dtype = torch.float64) -> S4:
    torch.manual_seed(0)
    return trained_like(S4(H, N, **KINDS[kind]).to(dtype))


def signal(length: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, H, dtype=dtype, generator=torch.Generator().manual_seed(1))


# --- law 2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 2, 75, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_step(kind: str, length: int, dtype: torch.dtype) -> None:
    """Law 2: the convolution equals the recurrence, sample by sample. Mutation: in step, `+ self.D * u32` dropped."""
    s4, u = layer(kind, dtype), signal(length, dtype)
    with torch.no_grad():
        state, outputs = s4.init_state(2), []
        for sample in u.unbind(1):
            y, state = s4.step(sample, state)
            outputs.append(y)
        assert relative(s4(u)[0], torch.stack(outputs, dim=1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_carries_state(kind: str) -> None:
    """Law 2: forward with a state, in pieces of any length and mixed with steps, is one forward.

    Mutation: in forward, `state = state._replace(x=x)` dropped.
    """
    s4, u = layer(kind), signal(333)
    with torch.no_grad():
        state, outputs, start = s4.init_state(2), [], 0
        for length in (1, 63, 64, 65, 3, 130):
            y, state = s4(u[:, start : start + length], state)
            outputs.append(y)
            start += length
        for sample in u[:, start:].unbind(1):
            y, state = s4.step(sample, state)
            outputs.append(y.unsqueeze(1))
        assert relative(torch.cat(outputs, dim=1), s4(u)[0]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("length", [1, 100, 333])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "kernel" not in KINDS[kind]])
def test_chunks_are_the_convolution(kind: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, FFTs with the kernel of the whole length, gives the outputs and gradients of the chunks; and in
    float32 under autocast.

    Mutations: in forward, `0 * self.D` for `self.D`; `enabled=False` -> `True`.
    """

    def results(chunks: bool) -> list[Tensor]:
        monkeypatch.setattr("sashimi.s4.in_chunks", lambda device: chunks)
        s4, u = layer(kind), signal(length).requires_grad_()
        y, state = s4(u)
        assert state is None
        return [y, *torch.autograd.grad((y * y).sum(), [u, *s4.parameters()])]

    for actual, expected in zip(results(False), results(True), strict=True):
        assert relative(actual, expected) < TOLERANCE[torch.float64]
    narrow = layer(kind, torch.float32)
    monkeypatch.setattr("sashimi.s4.in_chunks", lambda device: False)
    with torch.no_grad(), watched(narrow) as precision, torch.autocast("cpu", torch.bfloat16):
        narrow(signal(length).bfloat16())
    assert precision.products
    assert precision.faults == []


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_law_1_what_is_made_together_is_the_layers_own(
    kind: str, carried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels where they convolve, else systems; with their gradients, and float32 under autocast. But not Cauchy sums.

    Mutations: in `make`, `stack(parts[::-1])`; drop `startswith("cauchy")`, `and not carried` or `enabled=False`; in
    `S4.forward`, always `self.kernel` or `self.recurrence`.
    """

    def three(dtype: torch.dtype) -> list[S4]:
        return [trained_like(S4(H, N, **KINDS[kind]).to(dtype), seed) for seed in range(3)]

    layers = three(torch.float64)
    monkeypatch.setattr("sashimi.s4.in_chunks", lambda device: False)
    if kind == "cauchy" and not carried:
        assert make(layers, 50, carried) == [None] * 3
        return
    parameters = [p for s4 in layers for p in s4.parameters() if p is not s4.D]
    results = []
    for made in (make(layers, 50, carried), [s4.recurrence() if carried else s4.kernel(50) for s4 in layers]):
        values = flattened(made)
        results.append([values, *torch.autograd.grad((values * values).sum(), parameters)])
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 1e-12
    narrow, u = three(torch.float32), signal(50, torch.float32)
    with torch.no_grad():
        own = [s4.recurrence() if carried else s4.kernel(50) for s4 in narrow]
        with torch.autocast("cpu", torch.bfloat16):
            made = make(narrow, 50, carried)
        assert relative(flattened(made), flattened(own)) < 1e-5
        state = narrow[1].init_state(len(u)) if carried else None
        twice = made[1]._replace(C=2 * made[1].C) if isinstance(made[1], ssm.Recurrence) else 2 * made[1]
        direct = narrow[1].D * u
        assert relative(narrow[1](u, state, twice)[0] - direct, 2 * (narrow[1](u, state)[0] - direct)) < 1e-4


def test_layers_that_go_in_chunks_are_given_systems() -> None:
    """On CPUs, without a state too, but not in Cauchy sums. Mutation: in `make`, `whole = not carried`."""
    for kind, expected in (("tied", ssm.Recurrence), ("cauchy", type(None))):
        layers = [S4(H, N, **KINDS[kind]) for _ in range(2)]
        assert [type(made) for made in make(layers, 50, False)] == [expected] * 2


def flattened(made: Sequence[Made | None]) -> Tensor:
    """All numbers of kernels or systems."""
    each = [one if isinstance(one, ssm.Recurrence) else (one,) for one in made]
    return torch.cat([part.flatten() for one in each for part in one if part is not None])


def test_state_is_a_value() -> None:
    """Neither step nor forward writes into the state it is given. Mutation: in step, add `state.x.copy_(x)`."""
    s4, u = layer(), signal(10)
    with torch.no_grad():
        _, state = s4(u, s4.init_state(2))
        before = state.x.clone()
        s4(u, state)
        s4.step(u[:, 0], state)
    assert torch.equal(state.x, before)


# --- law 5 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_computes_in_float32(kind: str, autocast: torch.dtype | None, input_dtype: torch.dtype, scans: str) -> None:
    """Law 5: kernel, convolution, scan and step are float32 under autocast and for reduced inputs; only the result
    is cast, to the input's dtype.

    Mutations: in forward, `enabled=False` -> `enabled=True`; in forward or step, `u.to(self.D.dtype)` -> `u`.
    """
    s4, u = layer(kind, torch.float32), signal(100).to(input_dtype)
    with torch.no_grad():
        expected, _ = s4(u.float())
        with watched(s4) as precision, torch.autocast("cpu", autocast, enabled=autocast is not None):
            convolved, _ = s4(u)
            scanned, state = s4(u, s4.init_state(2))
            precision.depth += 1  # as if in a forward
            y, state = s4.step(u[:, 0], s4.init_state(2))
            precision.depth -= 1
    assert precision.faults == []
    assert precision.products >= (2 if scans == "native" else 3)
    assert state.x.dtype == state.recurrence.B.dtype == torch.float32
    for actual in (convolved, scanned, y):
        assert actual.dtype == input_dtype
    assert torch.equal(convolved, expected.to(input_dtype))
    assert relative(scanned, expected) < (1e-4 if input_dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_parameters_stay_float32(cast: torch.dtype) -> None:
    """Law 5: `.to(bfloat16)`, `.half()` and the like round no SSM parameter, also as part of a larger module;
    other dtypes and devices are followed.

    Mutation: in `_apply`, `t.to(moved.device) if …` -> `moved`.
    """
    s4 = layer("untied", torch.float32)
    values = {name: p.detach().clone() for name, p in s4.named_parameters()}
    whole = torch.nn.Sequential(s4, torch.nn.Linear(H, H)).to(cast)
    assert whole[1].weight.dtype == cast
    for name, p in s4.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, values[name]), name
    y, _ = s4(signal(20).to(cast))
    assert y.dtype == cast
    assert all(p.dtype == torch.float64 for p in whole.double().parameters())
    assert all(p.device.type == "meta" for p in whole.to("meta", cast).parameters())


# --- law 6 -------------------------------------------------------------------------------------------------


def norm_of_A(s4: S4) -> float:
    """The largest spectral norm over channels: an upper bound of the spectral radius."""
    with torch.no_grad():
        A = s4.recurrence().dense()
    assert A.isfinite().all()
    radius = torch.linalg.eigvals(A).abs().max().item()
    norm = torch.linalg.matrix_norm(A, 2).max().item()
    assert radius <= norm * (1 + 1e-12)
    return norm


@pytest.mark.parametrize("scale", [1, 10, 60])
@pytest.mark.parametrize("kind", ["tied", "untied", "softplus", "diagonal"])
def test_stable_for_any_parameters(kind: str, scale: float) -> None:
    """Law 6: whatever the parameters, no discrete A grows: spectral norm, hence radius, at most 1 (+ 1e-6).

    Mutations: in system, `-torch.exp(self.log_A_real)` -> `-self.log_A_real`; `Q=P` -> `Q=None if P is None else -P`.
    """
    for seed in range(20):
        assert norm_of_A(trained_like(layer(kind), seed, scale)) <= 1 + 1e-6


@pytest.mark.parametrize("kind", ["tied", "untied", "softplus", "diagonal"])
def test_stable_after_wild_training(kind: str) -> None:
    """Law 6: ascent on the output's power at a huge learning rate drives the layer to the edge, never over it.

    Mutation: in system, `-torch.exp(self.log_A_real)` -> `-self.log_A_real`.
    """
    s4 = layer(kind)
    start = norm_of_A(s4)
    optimizer = torch.optim.SGD(s4.parameters(), lr=3.0)
    u = signal(300)
    for _ in range(30):
        optimizer.zero_grad()
        power = s4(u)[0].square().mean()
        (-power.log()).backward()
        optimizer.step()
    assert start < norm_of_A(s4) <= 1 + 1e-6


# --- initialization ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["exp", "softplus"])
def test_time_steps_start_log_uniform(transform: str) -> None:
    """dt is log-uniform in [dt_min, dt_max] under both transforms: its quartiles are those of the log range.

    Mutations: in __init__, `ssm.softplus_inverse(log_dt.exp())` -> `log_dt`; drop `math.log(dt_min) +`.
    """
    torch.manual_seed(0)
    s4 = S4(4000, 2, dt_transform=transform, dt_min=0.01, dt_max=0.5)
    log_dt = s4.system().dt.detach().log()
    low, high = math.log(0.01), math.log(0.5)
    assert low - 1e-5 <= log_dt.min()
    assert log_dt.max() <= high + 1e-5
    quartiles = torch.quantile(log_dt, torch.tensor([0.25, 0.5, 0.75]))
    expected = low + (high - low) * torch.tensor([0.25, 0.5, 0.75])
    assert (quartiles - expected).abs().max() < 0.03 * (high - low)


@pytest.mark.parametrize("tie_state", [True, False])
def test_starts_as_hippo(tie_state: bool) -> None:
    """A fresh layer's A, P and B are HiPPO's (see test_ssm), shared or one a channel; C and D have unit variance.

    Mutations: in __init__, `torch.log(-Lambda.real)` -> `-Lambda.real`; `math.sqrt(0.5)` -> `1`.
    """
    torch.manual_seed(0)
    s4 = S4(300, N, tie_state=tie_state)
    system = s4.system()
    copies = 1 if tie_state else 300
    assert system.P is not None
    for actual, expected in zip((system.Lambda, system.P, system.B), ssm.hippo_legs(N), strict=True):
        assert actual.shape == (copies, N // 2)
        assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()
    assert system.C.shape == (300, N // 2)
    assert abs(system.C.abs().square().mean().item() - 1) < 0.1
    assert abs(s4.D.square().mean().item() - 1) < 0.3
