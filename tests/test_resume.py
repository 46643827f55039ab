"""Law 12 on one rank, and what may and may not change when a run goes on. More ranks: test_distributed.py."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command, curve, disk_of, metrics
from safetensors.torch import load_file

from sashimi import saver
from sashimi.distributed import Distributed
from sashimi.shard_writer import write_split
from sashimi.trainer import Trainer

Train = Callable[..., list[dict]]
KEEP = ("--train.keep_last", "10")


CARRY = ("--data.carry", "3", "--train.micro_batch", "2")


@pytest.mark.parametrize(
    "extra", [(), ("--optim.ema", "0.9"), ("--model.dropout", "0.2", "--train.micro_batch", "2"), CARRY]
)
def test_resume_is_no_interruption(train: Train, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Law 12: from the checkpoint of step 4, losses and weights are bit-equal to the run that went on.

    Mutations: leave out `restore_optimizer`, `restore_ema`, `torch.manual_seed`, or `rows.carried = part`.
    """
    unbroken = train("run", *KEEP, *extra)
    folder = tmp_path / "runs/run/checkpoints"
    shutil.copytree(folder / "step-00000012", tmp_path / "first")
    resumed = train("run", *KEEP, *extra, "--resume", str(folder / "step-00000004"))
    assert curve(resumed) == curve(unbroken)
    assert [line["epoch"] for line in resumed if "epoch" in line] == [
        line["epoch"] for line in unbroken if "epoch" in line
    ]
    for name in ("model", "optimizer", "ema")[: 3 if "--optim.ema" in extra else 2]:
        first = load_file(tmp_path / "first" / f"{name}.safetensors")
        second = load_file(folder / "step-00000012" / f"{name}.safetensors")
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)


def test_a_full_disk_costs_no_checkpoint(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law 14 on a disk that fills up: every failed save is said, training goes on to the end, which is an error; what
    was saved before stands, and once there is room the run goes on from it as if nothing had been.

    Mutation: in `save`, no `except OSError`.
    """
    unbroken = train("unbroken")
    train("run", "--train.steps", "4")
    capsys.readouterr()
    with disk_of(40_000), pytest.raises(SystemExit) as exit:
        train("run")
    assert exit.value.code == 2
    said = capsys.readouterr().err
    for step in (8, 12):
        assert f"step {step} is NOT SAVED: [Errno 27] File too large" in said
    assert "the last save failed, make room; steps after 4 are lost" in said
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == ["step-00000004"]
    assert curve(train("run")) == curve(unbroken)


def test_signals_during_saves_lose_nothing(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 12: two signals in the midst of a save, and two more in the save that a signal caused: each time one whole
    checkpoint of the last step, and the run goes on from there as if nothing had been.

    Mutations: `request_stop` raises SystemExit; `Trainer.train` saves once more where `saved == self.state.step`.
    """
    unbroken = train("unbroken")
    step, save = Trainer.step, saver.save_checkpoint
    saves = []

    def signalled_step(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        if self.state.step == 6:
            signal.raise_signal(signal.SIGUSR1)

    def signalled_save(folder: Path, at: int, *arguments: Any) -> Path:
        saves.append(at)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        return save(folder, at, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled_step)
        patch.setattr(saver, "save_checkpoint", signalled_save)
        for stopped_at in (4, 6):
            assert train("run")[-1]["step"] == stopped_at
            assert saves[-1] == stopped_at
    assert saves == [4, 6]
    assert curve(train("run")) == curve(unbroken)


def test_the_loss_scale_is_kept(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 12 with fp16's scaler, here on a model in float32: its scale and its count of good steps go on.

    Mutation: leave out `self.dist.loss_scale = ...` in `Saver.restore`.
    """
    join = Distributed.__init__

    def with_scaler(self: Distributed, timeout_minutes: float = 30) -> None:
        join(self, timeout_minutes)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

    monkeypatch.setattr(Distributed, "__init__", with_scaler)
    folder = tmp_path / "runs/run/checkpoints"
    unbroken = train("run", *KEEP)
    before = json.loads((folder / "step-00000012/state.json").read_text())
    assert before["loss_scale"]["scale"] == 4.0 * 2**4
    resumed = train("run", *KEEP, "--resume", str(folder / "step-00000004"))
    assert curve(resumed) == curve(unbroken)
    assert json.loads((folder / "step-00000012/state.json").read_text()) == before


def test_resume_auto_of_a_finished_run_changes_nothing(train: Train, tmp_path: Path) -> None:
    """Nothing is lost by running it once more. Mutation: validate at any start."""
    lines = train("run")
    checkpoint = tmp_path / "runs/run/checkpoints/step-00000012/manifest.json"
    written = checkpoint.stat().st_mtime_ns
    assert train("run") == lines
    assert checkpoint.stat().st_mtime_ns == written


def test_more_steps_go_on(train: Train, tmp_path: Path) -> None:
    """Steps may grow on resume; every step is logged once. Mutation: cut metrics.jsonl back to step 0."""
    train("run")
    lines = train("run", "--train.steps", "16")
    assert [line["step"] for line in lines if "train/bits" in line] == list(range(1, 17))


def test_retention(train: Train, tmp_path: Path) -> None:
    """The last k and the best checkpoints stay. Mutation: pass best_step=None to `prune`."""
    train("run", "--train.keep_last", "1", "--optim.lr", "0.01", "--train.save_every", "2")
    run = tmp_path / "runs/run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]
    # A learning rate that ruins the model leaves the best one behind.
    train("worse", "--train.keep_last", "1", "--optim.lr", "3", "--optim.clip", "0", "--optim.schedule", "constant")
    kept = sorted(path.name for path in (tmp_path / "runs/worse/checkpoints").iterdir())
    best = min((bits, step) for step, name, bits in curve(metrics(tmp_path / "runs/worse"))[1:] if name == "valid/bits")
    assert kept == sorted({f"step-{best[1]:08d}", "step-00000012"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model.d_model", "16"), "model.d_model=16: the checkpoint to resume from has 8"),
        (("--seed", "1"), "seed=1: the checkpoint to resume from has 0"),
        (("--data.segment", "256"), "data.segment=256: the checkpoint to resume from has 512"),
        (("--data.carry", "4"), "data.carry=4: the checkpoint to resume from has 0"),
        (("--audio.quantizer", "linear"), "audio.quantizer=linear: the checkpoint to resume from has mu-law"),
    ],
)
def test_what_may_not_change(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, ...], message: str
) -> None:
    """One line names the field and offers --init-from. Mutation: an empty FIXED_ON_RESUME."""
    train("run", "--train.steps", "3")
    before = (tmp_path / "runs/run/metrics.jsonl").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train("run", *change)
    assert (tmp_path / "runs/run/metrics.jsonl").read_text() == before
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {message}")
    assert "--init-from" in error


def test_rows_that_carry_state_may_not_change(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their number says which segments come next; without carried state it may. Mutation: drop the check of rows."""
    train("run", "--train.steps", "3", "--data.carry", "2")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train("run", "--train.batch_size", "2", "--data.carry", "2")
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: train.batch_size=2: with data.carry it may not change, and the checkpoint")
    assert metrics(tmp_path / "runs/run")[-1]["step"] == 3
    train("plain", "--train.steps", "3")
    assert train("plain", "--train.batch_size", "2", "--train.steps", "4")[-1]["step"] == 4


def test_shards_may_move_but_not_change(
    train: Train, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the shards elsewhere will do; other audio will not. Mutation: a constant `fingerprint`."""
    train("run", "--train.steps", "1")
    moved = shutil.copytree(tiny_shards, tmp_path / "moved")
    train("run", "--train.steps", "2", "--data.shards", str(moved))
    other = write_split(tmp_path / "other", "train", {"a": np.ones(5000, np.int16)}, 8000)
    write_split(other.folder, "valid", {"b": np.ones(500, np.int16)}, 8000)
    with pytest.raises(SystemExit):
        train("run", "--train.steps", "3", "--data.shards", str(other.folder))
    assert len(curve(metrics(tmp_path / "runs/run"))) == 5
    assert "not the shards that the checkpoint was trained on" in capsys.readouterr().err


def test_init_from_starts_at_the_other_runs_weights(train: Train, tmp_path: Path) -> None:
    """Fine-tuning begins with the other run's validation loss and its model, whatever the recipe says.

    Mutation: leave out `load_state_dict(weights)` in launch/train.py.
    """
    before = train("run")
    tuned = train("tuned", "--init_from", str(tmp_path / "runs/run"), "--model.d_model", "4", "--train.steps", "4")
    assert tuned[0]["valid/bits"] == pytest.approx(before[-1]["valid/bits"], rel=1e-6)
    again = train("tuned", "--init_from", str(tmp_path / "runs/run"), "--model.d_model", "4", "--train.steps", "6")
    assert [line["step"] for line in again if "train/bits" in line] == [1, 2, 3, 4, 5, 6]


def test_going_back_takes_everything_back(train: Train, tmp_path: Path) -> None:
    """From an older checkpoint on, the later ones are out of the way, and best.json is what the state says.

    Mutation: drop `rewind(...)` in launch/train.py.
    """
    run = tmp_path / "runs/run"
    train("run", *KEEP)
    assert json.loads((run / "best.json").read_text())["step"] > 6
    lines = train("run", *KEEP, "--resume", str(run / "checkpoints/step-00000004"), "--train.steps", "6")
    assert [line["step"] for line in lines if "train/bits" in line] == list(range(1, 7))
    names = ("step-00000004", "step-00000006", "step-00000008.abandoned", "step-00000012.abandoned")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == list(names)
    state = json.loads((run / "checkpoints/step-00000006/state.json").read_text())
    best = json.loads((run / "best.json").read_text())
    assert best == {"step": state["best_step"], "valid/bits": state["best_bits"]}


@pytest.mark.parametrize("ema", ["0", "0.5"])
def test_evaluation_is_of_the_best_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ema: str
) -> None:
    """A run is evaluated where its validation was best, with the weights that validation used, on its own shards.

    Mutations: `write_best(run, now.step, ...)`; no loop over `best` in `find_model_folder`.
    """
    ruin = ["--optim.lr", "0.5", "--optim.clip", "0", "--optim.schedule", "constant", "--optim.warmup_steps", "12"]
    lines = train("run", *KEEP, *ruin, "--optim.ema", ema, "--train.valid_every", "2")
    best = json.loads((tmp_path / "runs/run/best.json").read_text())
    valid = {step: bits for step, name, bits in curve(lines) if name == "valid/bits" and step}
    assert best == {"step": min(valid, key=lambda step: valid[step]), "valid/bits": min(valid.values())}
    assert best["step"] < 12
    capsys.readouterr()
    command("launch/evaluate.py", [str(tmp_path / "runs/run"), "--split", "valid"], monkeypatch)
    result = json.loads(capsys.readouterr().out)
    assert Path(result["model"]).name == f"step-{best['step']:08d}"
    assert result["bits_per_sample"] == pytest.approx(best["valid/bits"], rel=1e-6)


def test_an_average_may_begin_on_resume(train: Train, tmp_path: Path) -> None:
    """A run without one goes on with one, which starts from its weights; training itself is as before.

    Mutation: `checkpoint.ema or checkpoint.model` becomes `checkpoint.ema`.
    """
    plain = train("plain", *KEEP)
    train("run", *KEEP)
    folder = tmp_path / "runs/run/checkpoints"
    averaged = train("run", *KEEP, "--optim.ema", "0.9", "--resume", str(folder / "step-00000008"))
    assert [e for e in curve(averaged) if e[1] == "train/bits"] == [e for e in curve(plain) if e[1] == "train/bits"]
    assert json.loads((folder / "step-00000012/state.json").read_text())["ema_updates"] == 4
    ema, model = (load_file(folder / f"step-00000012/{name}.safetensors") for name in ("ema", "model"))
    assert ema.keys() == model.keys()
    assert not ema["head.bias"].equal(model["head.bias"])


def test_another_runs_checkpoint_is_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its state is not this run's: one line, with what to do instead. Mutation: no such check in `find_resume`."""
    train("other", "--train.steps", "1")
    capsys.readouterr()
    path = tmp_path / "runs/other/checkpoints/step-00000001"
    with pytest.raises(SystemExit) as exit:
        train("run", "--resume", str(path))
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: resume={path}: is not a checkpoint of this run")
    assert "--init-from" in line
    assert not (tmp_path / "runs/run").exists()


def test_one_writer_at_a_time(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While one process trains a run, another one is refused and moves nothing.

    Mutations: no `lock` in `RunTracker`; `rewind` before the tracker in launch/train.py.
    """
    run = tmp_path / "runs/run"
    train("run", *KEEP)
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", lock, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    files = [run / "metrics.jsonl", run / "best.json", run / "config.yaml", *(run / "checkpoints").rglob("*")]
    before = [path.stat().st_mtime_ns for path in files]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train("run", *KEEP, "--resume", str(run / "checkpoints/step-00000004"))
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {run}: another process trains this run; stop it, or take another --name"
    ]
    assert [path.stat().st_mtime_ns for path in files] == before
    other.communicate()
    train("run", *KEEP, "--resume", str(run / "checkpoints/step-00000004"))


def test_init_from_is_not_ignored_where_a_run_exists(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that began otherwise is not taken for the fine-tuning that was asked for.

    Mutation: drop the check of init_from in `compare_configs`.
    """
    train("run", "--train.steps", "2")
    train("other", "--train.steps", "2")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train("other", "--init_from", str(tmp_path / "runs/run"), "--train.steps", "4")
    assert "this run exists and did not start there; give a new --name" in capsys.readouterr().err
    assert metrics(tmp_path / "runs/other")[-1]["step"] == 2


def test_init_from_says_what_it_decides(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the recipe or the command line asked for. Mutation: do not hand `note` to `adopt_model`."""
    train("run", "--train.steps", "1")
    asked = ["--model.d_model", "4", "--audio.quantizer", "linear"]
    train("tuned", "--init_from", str(tmp_path / "runs/run"), "--train.steps", "1", *asked)
    decided = "decides: model.d_model=8 instead of 4, audio.quantizer=mu-law instead of linear"
    assert decided in capsys.readouterr().err


def test_init_from_says_that_the_sample_rate_changes(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the shards is taken, and said only where it is another. Mutation: drop the second `log`."""
    other = write_split(tmp_path / "other", "train", {"a": np.ones(5000, np.int16)}, 16000)
    write_split(other.folder, "valid", {"b": np.ones(500, np.int16)}, 16000)
    run, one = str(tmp_path / "runs/run"), ("--train.steps", "1")
    train("run", *one)
    train("same", *one, "--init-from", run)
    assert "trained at" not in capsys.readouterr().err
    train("tuned", *one, "--init-from", run, "--data.shards", str(other.folder), "--audio.sample_rate", "16000")
    assert f"{run} was trained at 8000 Hz and goes on at 16000 Hz" in capsys.readouterr().err
