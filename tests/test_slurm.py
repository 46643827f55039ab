"""The batch scripts on a real SLURM of two nodes: signals, requeueing, failures; training, sampling, evaluation."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, cluster
from conftest import RATE, TINY, command, launch, metrics
from test_elastic import assert_one_history

from sashimi.audio import AudioConfig
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import save_model
from sashimi.parsing import to_dict

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two idle nodes."""
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def steps(run: Path) -> list[int]:
    """The steps that a run has logged so far."""
    if not (run / "metrics.jsonl").exists():
        return []
    whole = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["step"] for line in whole if "train/bits" in line]


def processes(slurm: Cluster, **environment: str) -> list[psutil.Process]:
    """The cluster's Python processes that have these variables."""
    wanted = {"SLURM_CONF": slurm.environment["SLURM_CONF"], **environment}.items()
    found = []
    for process in psutil.process_iter(["environ", "name"]):
        if wanted <= (process.info["environ"] or {}).items() and process.info["name"].startswith("python"):
            found.append(process)
    return found


def arguments(folder: Path, shards: Path, name: str, length: Path) -> list[str]:
    """Of a run whose number of steps is in a file, so that it may change from one start of the job to the next."""
    run = ["--data.shards", str(shards), "--runs", str(folder), "--name", name, "--config", str(length)]
    steps = "--optim.schedule constant --train.valid_every 10 --train.save_every 100000".split()
    return [*TINY, *run, *steps, "--train.batch_size", "8", "--train.micro_batch", "1"]


def saved(run: Path) -> int:
    """The newest checkpoint's step, which is the last step that was done; 0 without one."""
    newest = max((path.name for path in (run / "checkpoints").glob("step-*")), default="step-00000000")
    assert newest == f"step-{max(steps(run), default=0):08d}"
    return int(newest[5:])


def assert_whole(run: Path, length: Path, shards: Path, last: int) -> None:
    """Each step once up to the last one, in TensorBoard too, with the losses of two processes' uninterrupted run."""
    done = launch(2, "launch/train.py", arguments(run.parent, shards, "whole", length), timeout=600)
    assert done.returncode == 0, done.stderr
    assert_one_history(run, metrics(run.with_name("whole")), rel=0)
    assert steps(run) == list(range(1, last + 1))


def test_training_goes_on(slurm: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    """Laws 12 and 14 on two nodes. A run is cancelled and submitted again, loses a process when a signal comes, is
    submitted again, gets those of a preemption and of a time limit, is queued again and goes on by itself to its end.
    Signals cost no step; a lost process costs those since the last checkpoint, as nobody saves without it. Only the
    job that was stopped by a signal is queued again. The curve is that of an uninterrupted run, every step once.

    Mutations: in node.sh, `accelerate` without `deaf`, or no PET_SIGNALS_TO_HANDLE (the launcher ends its processes
    and the job fails); in common.sh, `exit "$code"` for every code, or `requeue` for every code but 0, or whatever
    the state; in launch/train.py, no `stop_signals`.
    """
    run, length = tmp_path / "run", tmp_path / "length.yaml"
    length.write_text("train: {steps: 5000}")

    def submit() -> tuple[str, int]:
        """A job that has gone on from the last checkpoint for a few steps; that checkpoint's step."""
        before = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
        job = slurm.submit("train.slurm", *arguments(tmp_path, tiny_shards, "run", length))
        slurm.wait(job, lambda: f"from step {before}:" in slurm.log(job), "start")
        slurm.wait(job, lambda: max(steps(run), default=0) >= before + 3, "steps")
        return job, before

    job, _ = submit()
    slurm.call("scancel", job)
    assert slurm.end(job) == "CANCELLED"
    assert "stopped by a signal; go on with --resume auto" in slurm.log(job)
    cancelled_at = saved(run)

    job, before = submit()
    assert before == cancelled_at
    (victim,) = processes(slurm, RANK="1", SLURM_JOB_ID=job)
    victim.suspend()  # the other rank waits for it in a collective
    slurm.call("scancel", "--signal=USR1", job)
    time.sleep(2)
    kept = sorted((run / "checkpoints").iterdir())
    # That of a validation may have come before; they are ten steps apart.
    assert {number for path in kept if (number := int(path.name[5:])) % 10} <= {cancelled_at}
    victim.kill()
    assert slurm.end(job) == "FAILED"
    assert "error: lost another process" in slurm.log(job)
    assert sorted((run / "checkpoints").iterdir()) == kept
    assert slurm.field(job, "Restarts") == "0"

    job, _ = submit()
    slurm.call("scancel", "--signal=TERM", job)  # to all processes of the tasks
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, lambda: slurm.state(job) == "PENDING", "requeue")
    stopped_at = saved(run)
    length.write_text(f"train: {{steps: {stopped_at + 5}}}")
    slurm.restart(job)
    assert slurm.end(job) == "COMPLETED"
    assert slurm.field(job, "Restarts") == "1"
    assert f"from step {stopped_at}:" in slurm.log(job)
    assert "restart 1 of the SLURM job" in slurm.log(job)

    assert_whole(run, length, tiny_shards, stopped_at + 5)
    assert [line for line in metrics(run) if "slurm_restarts" in line] == [{"step": stopped_at, "slurm_restarts": 1}]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_signals_at_random_moments(slurm: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    """Law 12: one job, stopped ten times by the signal of a time limit at any moment since its start, or by those that
    its tasks get; no step is lost, missing or double.

    Mutations: in common.sh, no `trap`, or `kill -USR1` once instead of `relay`.
    """
    draw = random.Random(0)
    run, length = tmp_path / "run", tmp_path / "length.yaml"
    length.write_text("train: {steps: 100000}")
    job = slurm.submit("train.slurm", *arguments(tmp_path, tiny_shards, "run", length))
    for stop in range(1, 11):
        log = slurm.log(job)
        if draw.random() < 0.6:
            time.sleep(draw.uniform(0, 12))
            slurm.call("scancel", "--batch", "--signal=USR1", job)
        else:
            slurm.wait(job, lambda: slurm.log(job).count("from step") > log.count("from step"), "start")  # noqa: B023
            time.sleep(draw.uniform(0, 3))
            slurm.call("scancel", f"--signal={draw.choice(['USR1', 'TERM'])}", job)
        slurm.wait(job, lambda: slurm.state(job) == "PENDING", "requeue")
        stopped_at = saved(run)
        if stop == 10:
            length.write_text(f"train: {{steps: {stopped_at + 5}}}")
        slurm.restart(job)
    assert slurm.end(job) == "COMPLETED"
    assert slurm.field(job, "Restarts") == "10"
    assert_whole(run, length, tiny_shards, stopped_at + 5)


def test_clips_and_evaluation_do_not_depend_on_nodes(
    slurm: Cluster, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laws 8, 16 and 17 on two nodes. Sampling is ended by a signal after the first clips, not queued again as that is
    not allowed it, and when submitted again goes on to the files that one process makes. Evaluation, on the same nodes
    at the same time, scores what one process scores.

    Mutations: `--machine_rank 0` in node.sh (the nodes wait for each other for ever); `run_on_nodes USR1` in
    sample.slurm (all clips are made); in common.sh, no MAX_RESTARTS, or a constant MAIN_PORT.
    """
    config = ModelConfig(d_model=8, n_layers=1)
    model, several = str(tmp_path / "model"), tmp_path / "several"
    save_model(Path(model), Sashimi(config).state_dict(), to_dict(config), to_dict(AudioConfig(RATE)))
    argv = [model, "--seconds", "0.4", "--batch_size", "2", "--out"]
    job = slurm.submit("sample.slurm", *argv, str(several), "--clips", "2000", MAX_RESTARTS="0")
    slurm.wait(job, lambda: len(list(several.glob(".parts/clip-*.jsonl"))) >= 4, "clips")
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    assert slurm.end(job) == "FAILED"
    assert "stopped by a signal, not queued again: it has been MAX_RESTARTS=0 times" in slurm.log(job)
    clips = 5 + max(int(path.stem[5:]) for path in several.glob("clip-*.wav"))
    assert clips < 2000
    more = slurm.submit("sample.slurm", *argv, str(several), "--clips", str(clips))
    scores = [model, "--data", str(tiny_shards), "--segment", "512", "--out"]
    beside = slurm.submit("evaluate.slurm", *scores, str(tmp_path / "several.json"))
    assert [slurm.end(job) for job in (more, beside)] == ["COMPLETED", "COMPLETED"], slurm.log(more) + slurm.log(beside)

    assert f"{several}: {clips} clips" in slurm.log(more)
    assert f"{clips} are new" not in slurm.log(more)
    command("launch/sample.py", [*argv, str(tmp_path / "one"), "--clips", str(clips)], monkeypatch)
    for name in [f"clip-{clip:05d}.wav" for clip in range(clips)] + ["samples.jsonl"]:
        assert (several / name).read_bytes() == (tmp_path / "one" / name).read_bytes()

    command("launch/evaluate.py", [*scores, str(tmp_path / "one.json")], monkeypatch)
    (two, one) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("several", "one"))
    assert two["samples"] == one["samples"]
    assert two["bits_per_sample"] == pytest.approx(one["bits_per_sample"], rel=1e-6)
