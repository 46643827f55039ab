"""Laws 1 and 2 of the compiled recurrence: the reference's outputs, states and gradients, whatever system and size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from trained_like import relative, trained_like

from sashimi import ssm
from sashimi.native import library as native_library
from sashimi.native import scan as native
from sashimi.native.library import library
from sashimi.s4 import S4
from sashimi.scan import scan

KINDS: dict[str, dict] = {
    "tied": {},
    "untied": {"tie_state": False},
    "diagonal": {"mode": "diag", "kernel": "vandermonde"},
}


def layer(channels: int, d_state: int, kind: str = "tied", dtype: torch.dtype = torch.float64) -> S4:
    torch.manual_seed(0)
    return trained_like(S4(channels, d_state, **KINDS[kind]).to(dtype))


def signal(s4: S4, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """u and x of a layer's own type."""
    torch.manual_seed(length)
    channels, modes, _ = s4.C.shape
    u = torch.randn(batch, length, channels, dtype=s4.D.dtype)
    return u.requires_grad_(), torch.randn(batch, channels, 2 * modes, dtype=s4.D.dtype).requires_grad_()


def all_of(s4: S4, u: Tensor, x: Tensor | None, compiled: bool) -> list[Tensor]:
    """Outputs, state after, and the gradients of parameters, signal and state."""
    r = s4.recurrence()
    if compiled:
        y, after = native.scan(r, s4.D, u, x)
    elif x is None:
        y, after = scan(r.dense(), r.B, r.C, s4.D, u)
    else:
        y, after = ssm.scan_reference(r.dense(), r.B, r.C, u.mT, x)
        y = y.mT + s4.D * u
    inputs = [u, *s4.parameters()] if x is None else [u, x, *s4.parameters()]
    weights = torch.linspace(1, 2, y.shape[1], dtype=y.dtype).unsqueeze(-1)
    gradients = torch.autograd.grad((y * weights).sum(), inputs)
    return [y, *([] if after is None else [after]), *gradients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 200])
def test_it_is_the_recurrence(length: int, kind: str) -> None:
    """From any state, of whole and broken chunks, forward and back, of modes and channels that fill no vector or group.

    Mutations, in scan.cpp: in `forward`, `L / T * T` -> `L`; in `block`, `add` of the last product false; in the
    constructor, `kernel[0] +=` left out; in `parameters`, `d_diagonal` left out, or `T * (power_re` -> `(power_re`.
    """
    s4 = layer(19, 6, kind)
    u, x = signal(s4, 3, length)
    for actual, expected in zip(all_of(s4, u, x, True), all_of(s4, u, x, False), strict=True):
        assert relative(actual, expected) < 1e-11


@pytest.mark.parametrize(("length", "batch"), [(3839, 2), (3840, 2), (3841, 2), (8000, 2), (3841, 13)])
def test_blocks_of_chunks_follow_each_other(length: int, batch: int) -> None:
    """As in scan.py, from silence; a block is 60 chunks of 64, of up to six signals.

    Mutations, in scan.cpp: in `block` of Backward, no `std::copy_n`; in `backward`, no `std::fill`.
    """
    s4 = layer(2, 64)
    u, _ = signal(s4, batch, length)
    for actual, expected in zip(all_of(s4, u, None, True), all_of(s4, u, None, False), strict=True):
        assert relative(actual, expected) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 200, 3900])
def test_its_kernel_is_the_powers(length: int, kind: str) -> None:
    """Law 1, and the gradients.

    Mutations, in scan.py: in `kernel`, `length - 1` -> `length`; in scan.cpp: in `block` of Forward, `u != nullptr` ->
    `true`; in `block` of Backward, no `if (!u) continue`.
    """
    s4 = layer(3, 6, kind)
    r = s4.recurrence()
    expected = ssm.naive_kernel(r.dense(), r.B, r.C, length)
    actual = native.kernel(s4.recurrence(), length)
    assert relative(actual, expected) < 1e-10
    weights = torch.linspace(1, 2, length, dtype=torch.float64)
    inputs = [part for name, part in s4.named_parameters() if name != "D"]
    results = [torch.autograd.grad((kernel * weights).sum(), inputs) for kernel in (actual, expected)]
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-9


def test_it_continues() -> None:
    """Two of them, the second from the first's state, are one; the state has no gradient.

    Mutation: no `mark_non_differentiable`.
    """
    s4 = layer(5, 8)
    u, x = signal(s4, 2, 200)
    r = s4.recurrence()
    whole, last = native.scan(r, s4.D, u, x)
    first, middle = native.scan(r, s4.D, u[:, :75], x)
    second, end = native.scan(r, s4.D, u[:, 75:], middle)
    assert relative(torch.cat((first, second), dim=1), whole) < 1e-12
    assert end is not None
    assert last is not None
    assert relative(end, last) < 1e-12
    assert not last.requires_grad


@pytest.mark.parametrize("dt", [1e-5, 1e-3, 0.1, 10.0])
def test_it_is_near_in_float32(dt: float) -> None:
    """With all of HiPPO's 64 states, though A to the power 64 is a small difference of large numbers: 1e-4 of the
    outputs of the same discrete system in float64, 1e-3 of its gradients.

    Mutation: in `step`, `at(&a[i]) * w` -> `at(&a[i]) * (w * F(1.001))`.
    """
    torch.manual_seed(0)
    s4 = S4(8, 64, dt_min=dt, dt_max=dt)
    with torch.no_grad():
        r, D = s4.recurrence(), s4.D
    weights, u, x = torch.randn(2, 1000, 8), torch.randn(2, 1000, 8), torch.randn(2, 8, 64)
    results = []
    for dtype in (torch.float32, torch.float64):
        system = ssm.Recurrence(*(part.detach().to(dtype).requires_grad_() for part in r if part is not None))
        inputs = [part.detach().to(dtype).requires_grad_() for part in (D, u, x)]
        if dtype == torch.float32:
            y, _ = native.scan(system, *inputs)
        else:
            y, _ = ssm.scan_reference(system.dense(), system.B, system.C, inputs[1].mT, inputs[2])
            y = y.mT + inputs[0] * inputs[1]
        gradients = torch.autograd.grad((y * weights.to(dtype)).sum(), [*system, *inputs])
        results.append([y, *gradients])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert relative(actual.double(), expected) < (1e-3 if i else 1e-4)


def test_what_is_kept_may_lie_anywhere() -> None:
    """Such as what a hook of autograd keeps in a memory of its own. Mutation: in `aligned`, `% 1`."""

    def keep(tensor: Tensor) -> Tensor:
        kept = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        return kept.copy_(tensor)

    s4 = layer(3, 6)
    u, _ = signal(s4, 2, 200)
    expected = torch.autograd.grad(s4(u)[0].sum(), u)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = s4(u)
    assert torch.equal(torch.autograd.grad(y.sum(), u)[0], expected[0])


def test_any_number_of_threads() -> None:
    """Gives the same bits. Mutation: in `for_channels`, `h < H` -> `h < H / threads * threads`."""
    s4 = layer(71, 8, dtype=torch.float32)
    u, x = signal(s4, 2, 5000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(all_of(s4, u, x, True))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_too_little_memory_is_an_error() -> None:
    """Of Python's, which commands turn into a line; an exception of C++ would end the process. Mutation: no `catch`."""
    program = (
        "import resource, torch\n"
        "from sashimi.native.scan import scan\n"
        "from sashimi.ssm import Recurrence\n"
        "torch.set_num_threads(1)\n"
        "def of(H, N): return Recurrence(*(torch.zeros(H, n) for n in (N // 2, N // 2, N, N, N, N)))\n"
        "scan(of(1, 32), torch.zeros(1), torch.zeros(1, 1, 1))\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (10 << 20),) * 2)\n"
        "try: scan(of(16, 2048), torch.zeros(16), torch.zeros(1, 1, 16))\n"
        "except MemoryError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout == "forward of a state space of 16 channels and 2048 states\n", run.stderr


def test_layers_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, with and without a state, and for a kernel. Mutation: in S4._scan or s4._kernel, `if False`."""
    s4 = layer(4, 8)
    u, _ = signal(s4, 1, 10)
    taken = []

    def watched(*arguments: Tensor) -> tuple[Tensor, Tensor | None]:
        taken.append(arguments)
        return compiled(*arguments)

    compiled = native.scan
    monkeypatch.setattr(native, "scan", watched)
    s4(u)
    s4(u, s4.init_state(1))
    assert len(taken) == 2
    monkeypatch.setattr(native, "kernel", lambda *arguments: arguments)
    assert s4.kernel(10)[1] == 10


@pytest.mark.usefixtures("nothing_loaded")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch does it, which is said once. Mutation: in `library_or_none`, no warning."""
    s4 = layer(4, 8)
    u, _ = signal(s4, 1, 100)
    r = s4.recurrence()
    expected, _ = native.scan(r, s4.D, u)
    library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="run in PyTorch.*there is no C\\+\\+ compiler") as said:
        outputs = [s4(u)[0] for _ in range(2)]
    assert len(said) == 1
    assert all(relative(y, expected) < 1e-12 for y in outputs)


def test_processes_may_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each compiles for itself, and one file is kept. Mutation: in `library`, no `own.replace`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    program = "from sashimi.native.scan import is_available; assert is_available()"
    ranks = [subprocess.Popen([sys.executable, "-W", "error", "-c", program], cwd=ROOT) for _ in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    assert len(list((tmp_path / ".cache/sashimi").glob("scan-*.so"))) == 1
    assert len(list((tmp_path / ".cache/sashimi").iterdir())) == 1


def test_no_process_writes_into_anothers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one would load what the other has half written, and end. Mutation: `write_file(target, ...)`."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    written: list[Path] = []
    monkeypatch.setattr(native_library, "write_file", lambda path, content: written.append(path))
    for _ in range(2):
        native_library.library.__wrapped__("linear", "-fopenmp")
    assert len(set(written)) == 2
