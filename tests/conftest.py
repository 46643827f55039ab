"""Shared by the tests that train: tiny real shards, and the commands run in this process or in several real ones."""

import importlib.util
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from sashimi.native import scan as native_scan
from sashimi.native.library import library, library_or_none
from sashimi.shard_writer import write_split
from sashimi.split import Split

ROOT = Path(__file__).parent.parent
RATE = 8000

# A model and a schedule small enough for seconds, with every part of a run: warm-up, clipping, validation, saving.
TINY = (
    "--audio.sample_rate 8000 --data.segment 512 --data.workers 0 --data.crop true --model.d_model 8 "
    "--model.n_layers 1 --optim.lr 0.01 --optim.schedule cosine --optim.warmup_steps 3 --optim.clip 1 "
    "--train.batch_size 4 --train.steps 12 --train.valid_every 4 --train.save_every 4 "
    "--track.log_every 1 --track.audio_every 0"
).split()


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A test that trains in this process leaves it flushing denormals, with which hypothesis cannot make floats."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def accelerate_anew() -> Iterator[None]:
    """Accelerate knows of no precision yet, which it keeps for the whole process once it does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(params=["native", "plain"])
def scans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which code state spaces go over signals in chunks on CPUs: compiled, or PyTorch."""
    assert native_scan.is_available()
    if request.param == "plain":
        monkeypatch.setattr(native_scan, "is_available", lambda: False)
    return request.param


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """No compiled code has been asked for, at a test's beginning and after it."""
    for kept in (library, library_or_none):
        kept.cache_clear()
    yield
    for kept in (library, library_or_none):
        kept.cache_clear()


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones in noise, 0.04 to 0.4 s at 8 kHz, in all three splits: segments of unequal length at every batch."""
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    rng = np.random.default_rng(0)

    def clip() -> np.ndarray:
        t = np.arange(rng.integers(300, 3000)) / RATE
        tone = 8000 * np.sin(2 * np.pi * rng.uniform(100, 600) * t) + rng.normal(0, 300, len(t))
        return tone.astype(np.int16)

    for split, count in (("train", 23), ("valid", 7), ("test", 5)):
        write_split(folder, split, {f"{split}-{i:03d}": clip() for i in range(count)}, RATE, shard_recordings=10)
    return folder


@pytest.fixture
def train(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict]]:
    """train(NAME, *arguments) runs launch/train.py in this process; returns the lines of its metrics.jsonl."""

    def run(name: str, *arguments: str) -> list[dict]:
        argv = [*TINY, "--data.shards", str(tiny_shards), "--runs", str(tmp_path / "runs"), "--name", name, *arguments]
        command("launch/train.py", argv, monkeypatch)
        return metrics(tmp_path / "runs" / name)

    return run


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Within: writing a file beyond `size` bytes fails with a true OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


NOTES = re.compile("no checkpoint yet, starting from step 0|(files|shards)/s")


class Answer(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr, beside progress and the one that says that a run is new."""
        lines = [line for line in re.split("[\r\n]+", self.err) if line.strip() and not NOTES.search(line)]
        assert len(lines) == 1, self.err
        return lines[0]


Call = Callable[..., Answer]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call(SCRIPT, *arguments) runs a script in this process."""

    def run(script: str, *arguments: str) -> Answer:
        code = 0
        capsys.readouterr()
        try:
            command(script, list(arguments), monkeypatch)
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file of a folder was written, and its size; of folders and links only that they are there."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else (0, 0)
        for path in folder.rglob("*")
    }


@pytest.fixture
def shut_folder() -> Iterator[Path]:
    """A folder to fill, named "shut", which nobody may open within `powerless`; all may open what it is in."""
    with tempfile.TemporaryDirectory() as around:
        Path(around).chmod(0o755)
        folder = Path(around) / "shut"
        folder.mkdir()
        yield folder
        folder.chmod(0o700)


@contextmanager
def powerless(shut: Path) -> Iterator[None]:
    """Within: `shut` may not be read, and this process has no right to read it all the same, as root has."""
    shut.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def command(script: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script of the project as `python SCRIPT ARGV` would, in this process. SystemExit is passed on."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    runpy.run_path(str(ROOT / script), run_name="__main__")


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict]) -> list[tuple[int, str, float]]:
    """(step, name, bits) of every loss in them."""
    return [(line["step"], name, line[name]) for line in lines for name in line if name.endswith("/bits")]


def launch(
    processes: int, script: str, argv: list[str], timeout: float = 240, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a script with `accelerate launch` (and `options`) on several CPU processes of one thread each."""
    return subprocess.run(
        [*launcher(processes), *options, str(ROOT / script), *argv],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )


def launcher(processes: int) -> list[str]:
    """The command that starts that many processes on this machine, on a port of its own."""
    config = str(ROOT / "launch/accelerate/cpu.yaml")
    count = ["--num_processes", str(processes), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *count]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of GPUs where there is none, and skip, with the reason, what else this machine cannot run."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    missing = {
        "deepspeed": None if importlib.util.find_spec("deepspeed") else "deepspeed is not installed here",
        "slurm": None if shutil.which("slurmctld") else "slurmctld is not installed here",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def recording_lengths(split: Split) -> list[int]:
    """Samples of each recording of a split."""
    return [int(split.rows(recording)["samples"].sum()) for recording in range(split.n_recordings)]
