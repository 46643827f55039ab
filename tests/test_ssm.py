"""Law 1: every kernel is C A^l B. And what it stands on: HiPPO, discretization, convolution."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trained_like import relative, trained_like

import sashimi
from sashimi import keops, ssm
from sashimi.errors import InputError
from sashimi.s4 import S4

H, N = 5, 8
LENGTHS = (1, 2, 3, 4, 5, 31, 32, 33, 100, 257, 1000)

needs_keops = pytest.mark.skipif(
    find_spec("pykeops") is None or shutil.which("g++") is None, reason="needs pykeops and g++ (kernel=cauchy_keops)"
)


def layer(tie_state: bool = True, mode: str = "dplr", kernel: str = "krylov", d_state: int = N) -> S4:
    """A float64 layer with weights as after training."""
    torch.manual_seed(0)
    return trained_like(S4(H, d_state, tie_state=tie_state, mode=mode, kernel=kernel).double())


def unconstrained(system: ssm.System) -> ssm.System:
    """The system with Q ≠ P, as imported models may have it (half as strong a low-rank term keeps it stable)."""
    assert system.P is not None
    return system._replace(Q=0.5 * system.P * torch.exp(0.3j * torch.arange(system.P.shape[-1])))


def naive(system: ssm.System, length: int) -> Tensor:
    recurrence = ssm.discretize(system)
    return ssm.naive_kernel(recurrence.dense(), recurrence.B, recurrence.C, length)


def kernel_and_gradients(s4: S4, length: int) -> dict[str, Tensor]:
    """The kernel, and its gradient (of a fixed weighted sum) in every parameter that it depends on."""
    s4.zero_grad()
    K = naive(s4.system(), length) if s4.kernel_name == "naive" else s4.kernel(length)
    (K * torch.cos(torch.arange(K.numel(), dtype=K.dtype)).view_as(K)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in s4.named_parameters() if p.grad is not None}
    return {"K": K.detach()} | gradients


# --- the system --------------------------------------------------------------------------------------------


def real_system(system: ssm.System) -> tuple[Tensor, Tensor]:
    """The continuous A (H, N, N) and B (H, N) in real coordinates, written out from the definition."""
    A = torch.diag_embed(torch.cat((system.Lambda.real, system.Lambda.real), dim=-1))
    half = system.Lambda.shape[-1]
    A[..., :half, half:] = torch.diag_embed(-system.Lambda.imag)
    A[..., half:, :half] = torch.diag_embed(system.Lambda.imag)
    if system.P is not None and system.Q is not None:
        A = A - ssm.real_vector(system.P).unsqueeze(-1) * ssm.real_functional(system.Q.conj()).unsqueeze(-2)
    return A, ssm.real_vector(system.B)


@pytest.mark.parametrize("d_state", [2, 8, 64, 128])
def test_hippo_is_legs(d_state: int) -> None:
    """The diagonalized system is HiPPO-LegS: its transfer function from B to √(n + ½) at several frequencies.

    Mutations: in hippo_legs, `torch.full_like(frequency, -0.5)` -> `-1.0`; `V[:, d_state // 2 :]` -> `V[:, : …]`.
    """
    n = torch.arange(d_state, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    A = -torch.tril(B[:, None] * B[None, :], diagonal=-1) - torch.diag(n + 1)
    Lambda, P, B_modes = ssm.hippo_legs(d_state)
    assert Lambda.shape == (d_state // 2,)
    assert (Lambda.imag > 0).all()
    real_A, real_B = real_system(ssm.System(Lambda, P, P, B_modes, P, torch.ones(1)))
    for s in (0.1, 1.0, 10.0):
        expected = torch.sqrt(n + 0.5) @ torch.linalg.solve(s * torch.eye(d_state, dtype=torch.float64) - A, B)
        actual = ssm.real_functional(P.conj()) @ torch.linalg.solve(
            s * torch.eye(d_state, dtype=torch.float64) - real_A, real_B
        )
        assert abs(actual - expected) < 1e-10 * abs(expected)


@pytest.mark.parametrize("kind", ["tied", "untied", "unconstrained", "diagonal"])
def test_discretization_is_bilinear(kind: str) -> None:
    """discretize equals (1 − dt/2 A)⁻¹ (1 + dt/2 A) and (1 − dt/2 A)⁻¹ dt B by dense inverse; step equals dense.

    Mutations: in discretize, `a = dt * kappa * GP` -> `a = dt * GP`; in step, drop `self.a *`.
    """
    system = layer(kind == "tied", "diag" if kind == "diagonal" else "dplr").system()
    system = unconstrained(system) if kind == "unconstrained" else system
    A, B = real_system(system)
    dt = system.dt[:, None, None]
    inverse = torch.linalg.inv(torch.eye(N) - 0.5 * dt * A)
    recurrence = ssm.discretize(system)
    assert relative(recurrence.dense(), inverse @ (torch.eye(N) + 0.5 * dt * A)) < 1e-13
    assert relative(recurrence.B, (dt * inverse @ B.unsqueeze(-1)).squeeze(-1)) < 1e-13

    u, x = torch.randn(3, H, dtype=torch.float64), torch.randn(3, H, N, dtype=torch.float64)
    y, stepped = recurrence.step(u, x)
    expected = (recurrence.dense() @ x.unsqueeze(-1)).squeeze(-1) + recurrence.B * u.unsqueeze(-1)
    assert relative(stepped, expected) < 1e-13
    assert relative(y, (recurrence.C * expected).sum(-1)) < 1e-13


def test_time_step_and_its_inverse() -> None:
    """softplus_inverse inverts softplus from 1e-4 to 10; "exp" is exp. Mutation: drop `y +` in softplus_inverse."""
    dt = torch.logspace(-4, 1, 30, dtype=torch.float64)
    assert relative(ssm.time_step(ssm.softplus_inverse(dt), "softplus").log(), dt.log()) < 1e-12
    assert relative(ssm.time_step(dt.log(), "exp"), dt) < 1e-14


# --- law 1: kernels ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by ssm.py, as GPUs have them, and not by compiled code."""
    monkeypatch.setattr("sashimi.s4.in_chunks", lambda device: False)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tie_state", [True, False])
@pytest.mark.parametrize(
    ("mode", "kernel"),
    [("dplr", "krylov"), ("dplr", "cauchy"), ("diag", "krylov"), ("diag", "cauchy"), ("diag", "vandermonde")],
)
def test_kernel_is_naive_powers(mode: str, kernel: str, tie_state: bool, length: int) -> None:
    """Law 1: every kernel equals C A^l B to 1e-10 of its maximum in float64, for odd and even lengths.

    Mutations: in krylov_kernel, `KrylovBlocks.apply(A_s, …)` -> `(A_s.mT, …)`; in cauchy_kernel, drop
    `(1 + ω)`'s share: `p * half_dt` -> `half_dt`; in vandermonde_kernel, `torch.complex(C_re, -C_im)` -> `C_im`.
    """
    s4 = layer(tie_state, mode, kernel)
    with torch.no_grad():
        assert relative(s4.kernel(length), naive(s4.system(), length)) < 1e-10


@pytest.mark.parametrize("length", [9_999, 10_000])
@pytest.mark.parametrize(("mode", "kernel"), [("dplr", "krylov"), ("dplr", "cauchy"), ("diag", "vandermonde")])
def test_long_kernel_is_naive_powers(mode: str, kernel: str, length: int) -> None:
    """Law 1 at lengths of training. Mutation: in KrylovBlocks, `powers[k] @ powers[k]` -> `(…).float().double()`."""
    s4 = layer(True, mode, kernel)
    with torch.no_grad():
        s4.log_dt -= 3  # slow modes, so that the kernel has not died away before its end
        assert relative(s4.kernel(length), naive(s4.system(), length)) < 1e-10


@pytest.mark.parametrize("length", [32, 33])
@pytest.mark.parametrize("kernel", ["krylov", "cauchy"])
def test_kernel_of_unconstrained_system(kernel: str, length: int) -> None:
    """Law 1 with Q ≠ P, for imported models. Mutation: in cauchy_kernel, `system.Q.conj()` -> `system.P.conj()`."""
    system = unconstrained(layer().system())
    recurrence = ssm.discretize(system)
    with torch.no_grad():
        if kernel == "krylov":
            K = ssm.krylov_kernel(recurrence.dense(), recurrence.B, recurrence.C, length)
        else:
            K = ssm.cauchy_kernel(system, length)
        assert relative(K, naive(system, length)) < 1e-10


@pytest.mark.parametrize("length", [1, 2, 3, 50, 51])
@pytest.mark.parametrize("tie_state", [True, False])
@pytest.mark.parametrize(("mode", "kernel"), [("dplr", "krylov"), ("dplr", "cauchy"), ("diag", "vandermonde")])
def test_gradients_are_those_of_naive_powers(mode: str, kernel: str, tie_state: bool, length: int) -> None:
    """Law 1 for gradients: each parameter's equals that through the naive powers, to 1e-8 in float64.

    Mutation: in krylov_kernel, `A.expand(…)` -> `A.detach().expand(…)`; any product of KrylovBlocks.backward left out.
    """
    s4 = layer(tie_state, mode, kernel)
    actual = kernel_and_gradients(s4, length)
    s4.kernel_name = "naive"
    expected = kernel_and_gradients(s4, length)
    assert actual.keys() == expected.keys() >= {"K", "log_A_real", "A_imag", "B", "C", "log_dt"}
    for name in expected:
        assert relative(actual[name], expected[name]) < 1e-8, name


@pytest.mark.parametrize("length", [16_000, 131_072])
def test_float32_kernel_is_accurate(length: int) -> None:
    """Of a fresh full-size layer, the float32 kernel is within 1e-5 of max|K| of float64, at training lengths.

    Mutation: in KrylovBlocks.forward, `powers[k] @ powers[k]` -> `(…).bfloat16().to(A.dtype)`.
    """
    torch.manual_seed(0)
    s4 = S4(64, 64)
    with torch.no_grad():
        single = s4.kernel(length)
        assert single.dtype == torch.float32
        assert relative(single, s4.double().kernel(length)) < 1e-5


# --- law 1: KeOps ------------------------------------------------------------------------------------------


def keops_worker(source: str, out: str) -> None:
    """In a process of its own: kernels and gradients by KeOps of the layers in a file, into another."""
    results = {}
    for dtype in (torch.float64, torch.float32):
        for case, (tie_state, length, weights) in torch.load(source).items():
            s4 = layer(tie_state, kernel="cauchy_keops")
            s4.load_state_dict(weights)
            with torch.no_grad():  # the first use may well be an evaluation
                s4.to(dtype).kernel(length)
            results[dtype, case] = kernel_and_gradients(s4, length)
    torch.save(results, out)


def python(program: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a program in a process that may import this file, with PyKeOps's cache in a folder of its own."""
    root = Path(sashimi.__file__).parents[1]
    keops_environment = {"KEOPS_CACHE_FOLDER": str(cache), "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | keops_environment | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_keops
def test_keops_kernel_in_two_processes_at_once(tmp_path: Path) -> None:
    """Law 1 for cauchy_keops: K and gradients in float64 and float32, by two processes that compile at once.

    Mutations: in the formula, `ComplexMult(p, Conj(w))` -> `ComplexMult(p, w)`; in `_compiled`, drop the first
    flock (both compile a formula, or one loads what the other has half written); drop `torch.enable_grad()`.
    """
    cases = {
        (tie_state, length): (tie_state, length, layer(tie_state).state_dict())
        for tie_state in (True, False)
        for length in (1, 2, 3, 50, 51)
    }
    source = tmp_path / "cases.pt"
    torch.save(cases, source)
    log = tmp_path / "compiled"
    compiler = tmp_path / "g++-O0"  # half the time of PyKeOps's -O3
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec g++ "$@" -O0 -fno-lto\n')
    compiler.chmod(0o755)
    outs = [tmp_path / f"out-{i}.pt" for i in range(2)]
    program = "from test_ssm import keops_worker; keops_worker({!r}, {!r})"
    cache = tmp_path / "cache"
    processes = [python(program.format(str(source), str(out)), cache, CXX=str(compiler)) for out in outs]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-2000:]
    formulas = [line for line in log.read_text().splitlines() if "pykeops_cpp" in line]
    assert len(formulas) == len(set(formulas)) == 6  # value and two gradients, in two dtypes: once each
    for out in outs:
        for (dtype, (tie_state, length)), actual in torch.load(out).items():
            expected = kernel_and_gradients(layer(tie_state), length)
            assert actual.keys() == expected.keys()
            assert relative(actual["K"], expected["K"]) < (1e-10 if dtype == torch.float64 else 1e-4)
            for name in expected:
                assert actual[name].dtype == dtype
                assert relative(actual[name], expected[name]) < (1e-8 if dtype == torch.float64 else 1e-2), name


@needs_keops
def test_keops_without_compiler_says_so(tmp_path: Path) -> None:
    """Without a compiler the answer is one line that names it. Mutation: `if error.name not in (…)` -> `if False`."""
    program = (
        "from test_ssm import layer\n"
        "from sashimi.errors import InputError\n"
        "try: layer(kernel='cauchy_keops').kernel(5)\n"
        "except InputError as error: print('MESSAGE:', error)\n"
    )
    output, _ = python(program, tmp_path, PATH=str(tmp_path), CXX="").communicate(timeout=60)
    message = output.rpartition("MESSAGE: ")[2].strip()
    assert "\n" not in message
    assert "install a C++ compiler (g++)" in message
    assert "kernel=krylov" in message


def test_keops_missing_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without PyKeOps one line says what to install. Mutation: `if error.name not in …` -> `if True`."""
    monkeypatch.setenv("KEOPS_CACHE_FOLDER", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pykeops", None)
    monkeypatch.delitem(sys.modules, "pykeops.torch", raising=False)
    keops._lock.cache_clear()
    with pytest.raises(InputError, match=r"needs PyKeOps: pip install pykeops, or choose kernel=krylov$"):
        layer(kernel="cauchy_keops").kernel(5)
    keops._lock.cache_clear()


# --- convolution -------------------------------------------------------------------------------------------


def test_fft_length_is_the_next_fast_one() -> None:
    """The smallest 2^a·{1, 3, 5, 9, 15} that is no less. Mutation: in fft_length, drop 9."""
    fast = sorted(k << a for k in (1, 3, 5, 9, 15) for a in range(20))
    for n in [*range(1, 3000), 131_071, 131_072, 131_073, 262_143]:
        assert ssm.fft_length(n) == next(f for f in fast if f >= n)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 100])
@pytest.mark.parametrize("rows", [(), (2,), (3, 2)])
def test_convolution_is_causal_and_linear(length: int, rows: tuple[int, ...]) -> None:
    """y_t = Σ_{l ≤ t} K_l u_{t−l} + D u_t, with its gradients.

    Mutations: in Convolution, `fft_length(2 * length - 1)` -> `(length)`; drop `+ D` or either `.conj()`; `sum(0)` ->
    `[0]`; `d_kernel[..., 0]` -> `[..., -1]`.
    """
    torch.manual_seed(0)
    shapes = (*rows, H, length), (H, length), (H,)
    u, K, D = inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    direct = torch.stack(
        [sum(K[:, i] * u[..., t - i] for i in range(t + 1)) for t in range(length)],  # type: ignore[misc]
        dim=-1,
    )
    weight = torch.randn(*rows, H, length, dtype=torch.float64)
    results = [
        (y, *torch.autograd.grad((weight * y).sum(), inputs))
        for y in (ssm.causal_convolution(u, K, D), direct + D[:, None] * u)
    ]
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 1e-12
    assert results[0][-1].untyped_storage().nbytes() == 8 * H
