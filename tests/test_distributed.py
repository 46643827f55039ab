"""Real processes on one machine (gloo): ranks train, resume, evaluate and stop as one process does."""

import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, TINY, command, curve, launch, launcher, metrics

from sashimi.distributed import Distributed, begin_worker


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs of 1 and of 2 ranks, the latter with accumulation; both generate clips at times."""
    folder = tmp_path_factory.mktemp("distributed") / "runs"
    clips = ["--track.audio_every", "5", "--track.audio_clips", "3", "--track.audio_seconds", "0.01"]
    for ranks, more in ((1, []), (2, ["--train.micro_batch", "1"])):
        train(ranks, folder, tiny_shards, f"ranks-{ranks}", *clips, *more)
    return folder


def arguments(folder: Path, shards: Path, name: str, *more: str) -> list[str]:
    return [*TINY, "--data.shards", str(shards), "--runs", str(folder), "--name", name, *more]


def train(ranks: int, folder: Path, shards: Path, name: str, *more: str) -> list[dict]:
    done = launch(ranks, "launch/train.py", arguments(folder, shards, name, "--train.keep_last", "10", *more))
    assert done.returncode == 0, done.stderr
    return metrics(folder / name)


def assert_close(actual: list[dict], expected: list[dict], rel: float) -> None:
    pairs = list(zip(curve(actual), curve(expected), strict=True))
    assert [a[:2] for a, _ in pairs] == [e[:2] for _, e in pairs]
    assert all(a[2] == pytest.approx(e[2], rel=rel) for a, e in pairs)


def test_ranks_train_as_one(runs: Path) -> None:
    """Laws 7, 13 and 15: two ranks with unequal masks, two micro-batches each, give one process's losses and gradients,
    and none waits for the other in a save, in validation or for a clip.

    Mutations: drop `* self.world_size` in `Distributed.backward`; divide by this rank's own `scored`; in `train`, save,
    or in launch/train.py, generate clips, on the main rank alone.
    """
    two, one = metrics(runs / "ranks-2"), metrics(runs / "ranks-1")
    assert_close(two, one, rel=1e-6)
    norms = [[line["train/grad_norm"] for line in lines if "train/grad_norm" in line] for lines in (two, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # AdamW would hide gradients of another scale


def test_accumulation_is_ours_alone(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 13: what the launcher's environment says of accumulation does not scale the gradients.

    Mutation: drop `self.accelerator.gradient_accumulation_steps = 1` in `Distributed.__init__`.
    """
    norms = []
    for name in ("without", "with"):
        command("launch/train.py", arguments(tmp_path, tiny_shards, name, "--train.steps", "4"), monkeypatch)
        norms.append([line["train/grad_norm"] for line in metrics(tmp_path / name) if "train/grad_norm" in line])
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert len(norms[0]) == 4
    assert norms[0] == norms[1]


# launch/train.py, but rank 1's third loss is NaN while its gradient is finite; then each rank says where it is.
POISONED = """
import os, runpy, sys
from pathlib import Path
import torch
from sashimi import trainer

class Poisoned(trainer.Objective):
    losses = 0

    def forward(self, inputs, targets, mask):
        nats = super().forward(inputs, targets, mask)
        self.losses += self.training
        return nats + (float("nan") if self.training and self.losses == 3 and os.environ["RANK"] == "1" else 0.0)

train = trainer.Trainer.train

def train_and_tell(self, *arguments):
    complete = train(self, *arguments)
    weights = torch.cat([p.detach().flatten() for p in self.model.parameters()])
    torch.save((weights, self.state.step, self.state.skipped), Path(__file__).with_name(f"rank-{self.dist.rank}.pt"))
    return complete

trainer.Objective, trainer.Trainer.train = Poisoned, train_and_tell
runpy.run_path(TRAIN, run_name="__main__")
"""


def test_one_rank_without_a_finite_loss(tiny_shards: Path, tmp_path: Path) -> None:
    """Law 13: the ranks agree before any update; both skip the step, and go on with equal weights.

    Mutation: `(nats_sum,) = self.dist.sum(...)` becomes this rank's own sum.
    """
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.replace("TRAIN", repr(str(ROOT / "launch/train.py"))))
    done = launch(2, str(script), arguments(tmp_path, tiny_shards, "run"))
    assert done.returncode == 0, done.stderr
    (first, *state), (second, *other) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert state == other == [12, 1]
    assert first.equal(second)
    assert [line["step"] for line in metrics(tmp_path / "run") if line.get("train/bits", 0) is None] == [3]


def test_two_ranks_resume_bit_equal(runs: Path, tiny_shards: Path) -> None:
    """Law 12 with two ranks. Mutation: leave out `restore_optimizer`."""
    unbroken = metrics(runs / "ranks-2")
    resumed = train(
        2,
        runs,
        tiny_shards,
        "ranks-2",
        "--train.micro_batch",
        "1",
        "--resume",
        str(runs / "ranks-2/checkpoints/step-00000004"),
    )
    assert curve(resumed) == curve(unbroken)


def test_world_size_may_change_on_resume(runs: Path, tiny_shards: Path) -> None:
    """Laws 7, 9 and 12: one rank's run, gone on with by two. Mutation: start the stream at `position // world_size`."""
    unbroken = metrics(runs / "ranks-1")
    checkpoint = str(runs / "ranks-1/checkpoints/step-00000004")
    assert_close(train(2, runs, tiny_shards, "ranks-1", "--resume", checkpoint), unbroken, rel=1e-5)


def test_evaluation_does_not_depend_on_ranks(runs: Path, tiny_shards: Path) -> None:
    """Law 8: each segment once on 1, 2 and 3 ranks; in another precision the result is another, and says so.

    Mutations: `ids = arange(...) * world_size` without `+ rank`; in evaluate.py, another `precision`.
    """
    results = []
    for ranks, precision in ((1, "no"), (2, "no"), (3, "no"), (1, "bf16")):
        argv = [str(runs / "ranks-1"), "--data", str(tiny_shards), "--split", "test"]
        done = launch(ranks, "launch/evaluate.py", argv, options=["--mixed_precision", precision])
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert len({result["samples"] for result in results}) == 1
    assert [result["precision"] for result in results] == ["no", "no", "no", "bf16"]
    bits = [result["bits_per_sample"] for result in results]
    assert bits[:3] == pytest.approx(bits[:1] * 3, rel=1e-6)
    assert abs(bits[3] / bits[0] - 1) > 1e-6


def start(shards: Path, folder: Path, loaders: int, *more: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Two ranks' training without end or checkpoints, in its first steps; its processes and its loaders'."""
    endless = "--train.steps 100000 --train.save_every 100000 --train.valid_every 100000".split()
    argv = arguments(folder, shards, "run", *endless, "--data.workers", str(loaders), *more)
    script = str(ROOT / "launch/train.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*launcher(2), script, *argv], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = folder / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and "train/bits" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    found = subprocess.run(["pgrep", "-f", f"{script} .*--runs {folder}"], capture_output=True, text=True, check=True)
    workers = [int(pid) for pid in found.stdout.split() if int(pid) != process.pid]
    assert len(workers) >= 2 + 2 * loaders  # a loader's worker has its trainer's command line
    return process, workers


def assert_saved_at_its_end(run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert int(checkpoint.name[5:]) == metrics(run)[-1]["step"]


@pytest.mark.parametrize(
    ("number", "loaders"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGTERM, 1)], ids=["one", "usr1", "job"]
)
def test_signal_saves_on_all_ranks_and_resumes(
    tiny_shards: Path, tmp_path: Path, number: signal.Signals, loaders: int
) -> None:
    """A signal to one rank, or to every process of the job and so to the loaders' workers, stops all ranks after a
    checkpoint, with exit code 0; the run goes on from there.

    Mutations: leave `stop_requested` out of the all-reduce (the other rank would wait for its peer for ever); no
    `begin_worker` in launch/train.py (the workers die, and their trainer with them).
    """
    process, workers = start(tiny_shards, tmp_path, loaders)
    for pid in workers if loaders else workers[-1:]:
        os.kill(pid, number)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert "stopped by a signal" in stderr
    assert_saved_at_its_end(tmp_path / "run")


@pytest.mark.parametrize("valid", [False, True], ids=["training", "validation"])
def test_a_killed_loader_costs_no_step(tiny_shards: Path, tmp_path: Path, valid: bool) -> None:
    """As it is when memory runs out: all ranks save, and one line says what was lost.

    Mutations: no `except` in `_next`, in `evaluate`, or after `validate`; `n_lost` out of either sum; no
    `leave_workers_to_their_loader` (torch raises the error anywhere).
    """
    process, workers = start(tiny_shards, tmp_path, 1, *["--train.valid_every", "100"][: 2 * valid])
    rank = next(parent for pid in workers if (parent := psutil.Process(pid).ppid()) in workers)
    loaders = sorted(psutil.Process(rank).children(), key=psutil.Process.create_time)  # validation's comes first
    loaders[0 if valid else 1].kill()
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert re.search("error: .*a loader's worker ended unexpectedly on rank [01] [(]", stderr)
    assert "or lower data.workers or data.prefetch; the same command goes on" in stderr
    assert_saved_at_its_end(tmp_path / "run")


def test_workers_go_with_their_trainer(tmp_path: Path) -> None:
    """That was killed; they ignore other signals. Mutation: no `prctl`."""
    fork = multiprocessing.get_context("fork")

    def work() -> None:
        begin_worker(0)
        (tmp_path / "worker").write_text(str(os.getpid()))
        time.sleep(600)

    def train() -> None:
        fork.Process(target=work).start()
        time.sleep(600)

    trainer = fork.Process(target=train)
    trainer.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = psutil.Process(int((tmp_path / "worker").read_text()))
    trainer.kill()
    _, alive = psutil.wait_procs([worker], timeout=20)
    for orphan in alive:
        orphan.kill()
    assert not alive


@pytest.mark.parametrize(("hang_up", "code"), [(False, 130), (True, 0)], ids=["ctrl-c", "closed"])
def test_a_terminal_costs_no_step(tiny_shards: Path, tmp_path: Path, hang_up: bool, code: int) -> None:
    """Ctrl-C, which comes twice where there is a launcher, or a terminal that is closed: the last step is saved.

    Mutations: in `STOP_SIGNALS`, no SIGINT, or no SIGHUP; no KeyboardInterrupt at the end of `stop_signals`; in
    tracking.py, no `suppress` in `note`.
    """
    terminal, its_end = os.openpty()
    argv = arguments(tmp_path, tiny_shards, "run", *"--train.steps 100000 --train.save_every 100000".split())
    start = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", start, sys.executable, str(ROOT / "launch/train.py"), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        **dict.fromkeys(("stdin", "stdout", "stderr"), its_end),
        start_new_session=True,
    )
    os.close(its_end)
    log, deadline, shown = tmp_path / "run/metrics.jsonl", time.monotonic() + 120, b""
    while not (log.exists() and "train/bits" in log.read_text()):
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 1 << 16)
    if hang_up:
        os.close(terminal)
    else:
        os.write(terminal, b"\x03\x03")
        with suppress(OSError):  # at its end
            while more := os.read(terminal, 1 << 16):
                shown += more
        assert b"stopping after this step, to save" in shown
    assert process.wait(timeout=120) == code
    assert_saved_at_its_end(tmp_path / "run")


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what a launcher passes on within two seconds; and what is ignored stays so, but for a batch script's.

    Mutations: no `raise` in `request_stop`, or at once; `heard` of all signals, or of all that are not ignored.
    """
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    dist, before = Distributed(), {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGHUP, signal.SIGUSR1)}
    try:
        with ExitStack() as stack:
            stack.enter_context(pytest.raises(KeyboardInterrupt))  # at the end
            stack.enter_context(dist.stop_signals())
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN
            for now[0] in (100.0, 101.0):
                signal.raise_signal(signal.SIGINT)
                assert dist.stop_requested
            now[0] = 103.0
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            now[0] = 0.0
        assert now[0] == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_products_are_float32() -> None:
    """Law 5 where the environment or a library has asked for TF32. Mutation: drop `set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        Distributed()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_freed_memory_is_kept() -> None:
    """What a step on a CPU frees is there for the next one: few of the pages of 64 MB are fetched again.

    An aligned block may miss the one just freed by some bytes, so that two or three places take turns.

    Mutation: drop the call of _keep_freed_memory, or its M_MMAP_MAX.
    """
    program = (
        "import resource, torch; from sashimi.distributed import Distributed; Distributed()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "for _ in range(32): torch.ones(1 << 24)\n"
        "print(faults() - before)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout) < 8 * 16_384  # of 32 x 16,384
