"""The loss of a step, what is skipped, what validation uses: laws 13 and 8 on one rank. See test_distributed.py."""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import curve, recording_lengths
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sashimi import saver
from sashimi.audio import Quantizer
from sashimi.checkpoint import load_checkpoint
from sashimi.distributed import Distributed
from sashimi.loss import nll
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import load_model
from sashimi.objective import Objective
from sashimi.optim import OptimConfig, Plateau
from sashimi.run_state import RunState
from sashimi.sampler import generate
from sashimi.split import open_split
from sashimi.stream import AudioConfig, Batch, DataConfig, Place, TrainingData, eval_batches
from sashimi.tracking import Tracker
from sashimi.trainer import TrainConfig, Trainer, evaluate

Train = Callable[..., list[dict]]


@pytest.fixture
def trainer(tiny_shards: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer over the tiny shards: micro-batches of `micro_batch` rows, 4 segments a step."""

    def make(micro_batch: int = 4, ema: float = 0.0, carry: int = 0, **config: int) -> Trainer:
        torch.manual_seed(0)
        data = DataConfig(str(tiny_shards), segment=512, workers=0, carry=carry)
        settings = {"batch_size": 4, "micro_batch": micro_batch, "steps": 3, "save_every": 100} | config
        return Trainer(
            Distributed(),
            Sashimi(ModelConfig(d_model=8, n_layers=1)),
            TrainingData(data, AudioConfig(8000), 0, 4, micro_batch),
            TrainConfig(**settings),
            OptimConfig(schedule="constant", ema=ema),
            seed=0,
            run_config={},
            folder=tmp_path / "checkpoints",
        )

    return make


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).double()


def test_accumulation_equals_one_batch(trainer: Callable[..., Trainer]) -> None:
    """Law 13: a step does not depend on how its batch is cut, though the pieces score unequal numbers of samples.

    Mutation: divide each micro-batch's nats by its own `batch.mask.sum()` in `Trainer.step`.
    """
    whole, pieces = trainer(4), trainer(1)
    batch = next(whole.data.batches(0))
    assert len(set(batch.mask.sum(1).tolist())) > 1
    whole.train(Tracker())
    pieces.train(Tracker())
    assert torch.allclose(weights(whole), weights(pieces), rtol=0, atol=1e-5)


def test_step_is_gradient_of_mean_nats(trainer: Callable[..., Trainer]) -> None:
    """Law 13: the update follows the gradient of (summed nats) / (scored samples) of the batch.

    Mutation: `nats / max(count, 1)` becomes `nats / batch.mask.numel()`.
    """
    subject = trainer(2)
    micro_batches = [batch for batch, _ in zip(subject.data.batches(0), range(2), strict=False)]
    rows = [torch.cat([getattr(batch, name) for batch in micro_batches]) for name in ("inputs", "targets", "mask")]
    nats, count = nll(subject.model(rows[0]), rows[1], rows[2])
    expected = torch.autograd.grad(nats / count, subject.parameters)
    gradients: list[torch.Tensor] = []
    subject.optimizer.step = lambda: gradients.extend(p.grad.clone() for p in subject.parameters)
    subject.step(micro_batches, int(count))
    for actual, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_masked_batch_changes_nothing_but_position(trainer: Callable[..., Trainer]) -> None:
    """Law 13: an all-masked batch makes no update, not even Adam's momentum; the position advances.

    Mutation: `if finite and count` becomes `if finite`.
    """
    subject = trainer(4)
    batches = subject.data.batches(0)
    subject.step([next(batches)], 100)  # gives Adam a momentum that a further update would follow
    before = weights(subject)
    batch = next(batches)
    subject.step([batch._replace(samples=0 * batch.samples)], 0)
    assert torch.equal(weights(subject), before)
    assert subject.state == RunState(step=2, position=8, skipped=1)


def test_not_finite_is_skipped_then_stops(trainer: Callable[..., Trainer], tiny_shards: Path) -> None:
    """Steps without a finite loss leave the weights alone, are counted, and end the run with their segments named.

    Mutation: `if finite and count` becomes `if count`.
    """
    subject = trainer(4, max_bad_steps=2)
    batches = subject.data.batches(0)
    with torch.no_grad():
        subject.model.head.bias.fill_(float("nan"))
    before = weights(subject)
    batch = next(batches)
    subject.step([batch], int(batch.mask.sum()))
    assert torch.equal(weights(subject).nan_to_num(), before.nan_to_num())
    assert subject.state == RunState(step=1, position=4, skipped=1, bad=1)
    with pytest.raises(ValueError, match=r"no finite loss.*recording train-\d+, samples .*--resume auto") as error:
        subject.step([batch], int(batch.mask.sum()))
    assert str(error.value).count("recording") == 4


def test_evaluate_scores_every_segment_once(trainer: Callable[..., Trainer]) -> None:
    """Law 8: the sum of nats over the split, however it is batched. Mutation: filler rows with a mask of ones."""
    subject = trainer(4)
    rows: list[Batch] = list(subject.data.valid_batches)
    with torch.no_grad():
        expected = sum(float(nll(subject.model(b.inputs), b.targets, b.mask)[0]) for b in rows)
    samples = int(subject.data.valid_batches.dataset.split.index["samples"].sum())
    nats, count, faults = evaluate(Objective(subject.model), subject.data.valid_batches, subject.dist)
    assert count == samples
    assert nats == pytest.approx(expected, rel=1e-6)
    assert not faults


def test_validation_uses_averaged_weights(trainer: Callable[..., Trainer]) -> None:
    """With EMA on, validation is of the average. Mutation: `validate` always takes self.objective."""
    subject = trainer(4, ema=0.9)
    subject.train(Tracker())
    assert subject.ema is not None
    nats, count, _ = evaluate(Objective(subject.ema.module), subject.data.valid_batches, subject.dist)
    best = subject.state.best_bits
    assert best == pytest.approx(nats / count / 0.6931471805599453, rel=1e-9)
    saved = load_checkpoint(subject.folder / "step-00000003")
    assert saved.ema is not None
    assert not torch.equal(saved.ema["head.bias"], saved.model["head.bias"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_listens_to_the_validated_model(trainer: Callable[..., Trainer], ema: float) -> None:
    """After every step, the averaged model if there is one. Mutation: `listen(self.model, step)`, or `step - 1`."""
    subject = trainer(4, ema=ema)
    heard: list[tuple[torch.nn.Module, int]] = []
    subject.train(Tracker(), lambda model, step: heard.append((model, step)))
    model = subject.model if subject.ema is None else subject.ema.module
    assert (subject.ema is None) == (ema == 0)
    assert heard == [(model, 1), (model, 2), (model, 3)]


def test_generated_audio_is_in_tensorboard(train: Train, tmp_path: Path) -> None:
    """Every audio_every steps, each clip at the run's rate and of its length; the training is not disturbed.

    Mutations: in launch/train.py, drop `tracker.audio` or `Quantizer(...).decode`, or pass `samples` for the rate.
    """
    audio = ["--track.audio_every", "4", "--track.audio_seconds", "0.01", "--track.audio_clips", "2"]
    assert curve(train("audio", *audio)) == curve(train("silent"))
    events = EventAccumulator(str(tmp_path / "runs/audio"))
    events.Reload()
    for clip in ("generated/0", "generated/1"):
        assert [(event.step, event.sample_rate) for event in events.Audio(clip)] == [(4, 8000), (8, 8000), (12, 8000)]
        assert {len(event.encoded_audio_string) for event in events.Audio(clip)} == {44 + 2 * 80}
    model = load_model(tmp_path / "runs/audio/checkpoints/step-00000012")
    expected = Quantizer(AudioConfig(8000)).decode(generate(model, 80, [1], seed=0))[0]
    sound = np.frombuffer(events.Audio("generated/1")[-1].encoded_audio_string[44:], "<i2") / 32767
    assert np.abs(sound - expected.numpy()).max() < 1e-3
    assert np.abs(sound).max() > 0


def no_space(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk is full whenever a checkpoint of one of these steps is written."""
    write = saver.save_checkpoint

    def full(folder: Path, step: int, *rest: object) -> Path:
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, step, *rest)

    monkeypatch.setattr(saver, "save_checkpoint", full)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir())


def test_a_full_disk_does_not_stop_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A save that fails is said, and the next one is tried. Mutation: `failed = True` becomes `raise`."""
    no_space(monkeypatch, 8)
    lines = train("run", "--train.keep_last", "10")
    assert [line["step"] for line in lines if "train/bits" in line] == list(range(1, 13))
    assert "step 8 is NOT SAVED: [Errno 28] No space left on device" in capsys.readouterr().err
    assert steps_in(tmp_path / "runs/run/checkpoints") == [4, 12]


def test_weights_that_an_update_spoilt_are_not_saved(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss was finite; from such a checkpoint nothing goes on. Mutation: no `spoilt` in saver.py."""
    subject = trainer(4, save_every=1, valid_every=100, max_bad_steps=1)
    with torch.no_grad():
        subject.model.head.bias[7] = torch.inf
    assert not subject.save()
    assert "step 0 is NOT SAVED: NaN or infinity in head.bias (1 of" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_a_failed_last_save_is_an_error(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was not saved is no success: one line, exit code 2, and what was saved before stands.

    Mutation: drop `elif last` and its `raise`.
    """
    no_space(monkeypatch, 8, 12)
    with pytest.raises(SystemExit) as exit:
        train("run", "--train.keep_last", "1")
    assert exit.value.code == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")] == [
        f"error: {tmp_path}/runs/run/checkpoints: the last save failed, make room; steps after 4 are lost"
    ]
    assert steps_in(tmp_path / "runs/run/checkpoints") == [4]
    assert json.loads((tmp_path / "runs/run/best.json").read_text())["step"] == 4


def test_a_stopped_run_says_that_it_could_not_save(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal while the disk is full. Mutation: in `train`, `return False` whatever that `self.save()` says."""
    no_space(monkeypatch, 2)
    subject = trainer(4)
    with pytest.raises(ValueError, match="the last save failed, make room; steps after 0 are lost"):
        subject.train(Tracker(), lambda model, step: setattr(subject.dist, "stop_requested", step == 2))


def test_a_best_model_that_was_not_saved(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a better one is on disk, the old best checkpoint stays and best.json names it.

    Mutations: `prune(..., now.best_step)`; drop `has_checkpoint(...)` in `Saver._write`.
    """
    no_space(monkeypatch, 2)
    subject = trainer(4, keep_last=1)
    saved = []
    for step, best_step, best_bits in ((1, 1, 3.0), (2, 2, 2.0), (3, 2, 2.0), (4, 2, 2.0)):
        subject.state = RunState(step=step, best_step=best_step, best_bits=best_bits)
        saved.append(subject.save())
    assert saved == [True, False, True, True]
    assert steps_in(subject.folder) == [1, 4]
    assert json.loads((subject.folder.parent / "best.json").read_text()) == {"step": 1, "valid/bits": 3.0}


def test_a_diverged_model_is_not_saved(trainer: Callable[..., Trainer]) -> None:
    """Weights that became NaN after step 3 stop the run at step 7, and no checkpoint of them is left.

    Mutation: drop the `continue` for bad steps in `train`.
    """
    subject = trainer(4, steps=20, save_every=2, valid_every=100, max_bad_steps=4)

    def ruin(model: torch.nn.Module, step: int) -> None:
        if step == 3:
            subject.model.head.bias.data.fill_(float("nan"))

    with pytest.raises(ValueError, match="no finite loss and gradient in 4 steps up to 7"):
        subject.train(Tracker(), ruin)
    assert steps_in(subject.folder) == [2]


@pytest.mark.parametrize("stop", [True, False])
def test_the_end_of_a_diverged_run_is_not_saved(trainer: Callable[..., Trainer], stop: bool) -> None:
    """Neither at a request to stop within a bad row nor at the last step: the good checkpoint stays the newest.

    Mutations: drop `and not self.state.bad`, or the error for a bad last step, in `train`.
    """
    subject = trainer(4, steps=6, save_every=2, valid_every=100, keep_last=1)

    def ruin(model: torch.nn.Module, step: int) -> None:
        if step == 3:
            subject.model.head.bias.data.fill_(float("nan"))

    class Stopper(Tracker):
        def step(self, step: int, scalars: Mapping[str, float], samples: int, position: int) -> None:
            subject.dist.stop_requested = stop and step == 5

    if stop:
        assert not subject.train(Stopper(), ruin)
    else:
        with pytest.raises(ValueError, match="no finite loss at the last step, 6, so it is not saved"):
            subject.train(Stopper(), ruin)
    assert steps_in(subject.folder) == [2]


@pytest.mark.parametrize(("scale", "bad"), [({"scale": 65536.0}, 0), ({"scale": 1.0}, 1), ({}, 1)])
def test_an_overflow_of_fp16_is_not_a_bad_step(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, scale: dict[str, float], bad: int
) -> None:
    """A finite loss with an infinite gradient is skipped, and counts as bad unless a loss scale can still be lowered.

    Mutations: `bad=0 if finite`; `> 1` becomes `>= 1`.
    """
    subject = trainer(4)
    monkeypatch.setattr(Distributed, "loss_scale", scale)
    subject.model.head.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(subject)
    batch = next(subject.data.batches(0))
    subject.step([batch], int(batch.mask.sum()))
    assert torch.equal(weights(subject), before)
    assert (subject.state.skipped, subject.state.bad) == (1, bad)


def test_state_survives_json() -> None:
    """`from_json` undoes `to_json`. Mutation: leave "bad" out of `known`."""
    state = RunState(7, 28, Plateau(3.2, 4, 0.04), 4, 3.1, skipped=3, bad=2)
    assert RunState.from_json(7, json.loads(json.dumps(state.to_json()))) == state


def test_plateau_lowers_the_rate(train: Train) -> None:
    """The schedule is stepped from validation. Mutation: `validate` does not store the new plateau state."""
    plateau = ["--optim.schedule", "plateau", "--optim.plateau_patience", "0", "--optim.plateau_threshold", "0.5"]
    lines = train("plateau", *plateau, "--optim.warmup_steps", "0", "--train.valid_every", "2")
    rates = [line["lr/main"] for line in lines if "lr/main" in line]
    assert rates[:4] == [0.01] * 4  # the first evaluation, at step 2, improves on nothing
    assert rates[4] == pytest.approx(0.002)
    assert rates[6] == pytest.approx(0.0004)


def test_learning_falls(train: Train) -> None:
    """Twelve steps at a warm rate already improve the validation. Mutation: skip `optimizer.step()`."""
    valid = [bits for _, name, bits in curve(train("falls")) if name == "valid/bits"]
    assert valid[-1] < valid[0] - 0.1


def test_damaged_segment(train: Train, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law 8: a damaged member is masked and named and the run goes on; `fatal` saves and stops, naming it.

    Mutation: in `train`, drop `or (n_faults and ...)`.
    """
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in tiny_shards.iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "train-000001.tar":
            content[600:5000] = bytes(4400)
        (damaged / file.name).write_bytes(content)
    shards = ["--data.shards", str(damaged)]
    assert len([line for line in train("masked", *shards) if "train/bits" in line]) == 12
    assert "train-000001.tar" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("fatal", *shards, "--data.on_damage", "fatal")
    assert "error: data.on_damage=fatal stopped after step " in capsys.readouterr().err
    steps = [int(path.name[5:]) for path in (tmp_path / "runs/fatal/checkpoints").iterdir()]
    assert steps
    assert max(steps) < 12


def test_lost_shards_stop_the_run(trainer: Callable[..., Trainer], tiny_shards: Path, tmp_path: Path) -> None:
    """Where nothing can be decoded any more, max_bad_steps later the run ends and says why; it does not "finish".

    Mutation: drop the error for `unscored`.
    """
    subject = trainer(4, steps=20, save_every=2, valid_every=100, max_bad_steps=3)
    subject.data.train = open_split(shutil.copytree(tiny_shards, tmp_path / "lost"), "train")

    def lose(model: torch.nn.Module, step: int) -> None:
        if step == 4:
            shutil.rmtree(tmp_path / "lost")

    with pytest.raises(ValueError, match=r"no segment of 3 steps could be decoded, such as .*\.tar.*--resume auto"):
        subject.train(Tracker(), lose)
    assert subject.state.step == 6
    assert subject.state.bad == 0


# ---- state carried over segments


def test_carried_state_is_each_micro_batchs_own(train: Train) -> None:
    """Law 13 with carried state: losses, of training and validation, do not depend on how a batch is cut.

    Mutation: in `Trainer.step`, `self.rows[0]` for every micro-batch.
    """
    whole = train("whole", "--data.carry", "3")
    pieces = train("pieces", "--data.carry", "3", "--train.micro_batch", "1")
    assert [bits for *_, bits in curve(pieces)] == pytest.approx([bits for *_, bits in curve(whole)], rel=1e-5)


def test_training_goes_on_from_the_segment_before(trainer: Callable[..., Trainer]) -> None:
    """A step's nats are those of its segments given all that its rows have played of their recordings.

    Mutations: in `Rows.play`, `self.carried` stays `self.beginning`; in `Segments`, all rows reset.
    """
    subject = trainer(4, carry=4)
    subject.optimizer.step = lambda: None
    heard: list[dict[str, float]] = []
    subject.tracker.step = lambda step, scalars, samples, position: heard.append(scalars)
    batches, played = subject.data.batches(0), []
    for _ in range(6):
        played.append(next(batches))
        subject.step(played[-1:], int(played[-1].mask.sum()))
    lengths = []
    for step, scalars in enumerate(heard):
        nats = 0.0
        for row in range(4):
            since = max(s for s in range(step + 1) if played[s].resets[row])
            inputs, targets, mask = (
                torch.cat([getattr(batch, name)[row] for batch in played[since : step + 1]])
                for name in ("inputs", "targets", "mask")
            )
            inputs[1:] = targets[:-1]
            with torch.no_grad():
                logits = subject.model(inputs[None])[:, -512:]
            nats += float(nll(logits, targets[None, -512:], mask[None, -512:])[0])
            lengths.append(step + 1 - since)
        assert scalars["train/bits"] == pytest.approx(nats / float(played[step].mask.sum()) / np.log(2), rel=1e-5)
    assert max(lengths) > 2


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_evaluation_is_of_whole_recordings(trainer: Callable[..., Trainer], ema: float) -> None:
    """With state carried, the nats of recordings as wholes, to 1e-9 for any division among rows and ranks.

    Mutations: in `evaluate`, Rows(()); in `Objective`, inputs as they are.
    """
    subject = trainer(4, carry=2, ema=ema)
    subject.train(Tracker())
    model = (subject.model if subject.ema is None else subject.ema.module).double().eval()
    split, quantizer = open_split(subject.data.data.shards, "valid", None), Quantizer(AudioConfig(8000))
    expected = 0.0
    for recording, samples in enumerate(recording_lengths(split)):
        targets = quantizer.encode(torch.from_numpy(split.read(recording, 0, samples)) / 32768)[None]
        inputs = torch.cat((torch.full((1, 1), 128), targets[:, :-1]), dim=1)
        with torch.no_grad():
            expected += float(nll(model(inputs), targets, torch.ones_like(targets, dtype=torch.bool))[0])
    objective = Objective(model, carry=True)
    for rows, world_size, segment in ((1, 1, 512), (3, 1, 64), (50, 1, 512), (2, 2, 512), (1, 3, 1600)):
        data = replace(subject.data.data, segment=segment)
        nats, count = 0.0, 0
        for rank in range(world_size):
            batches = eval_batches(split, data, AudioConfig(8000), rows, Place(rank, world_size))
            part, scored, faults = evaluate(objective, batches, subject.dist, objective.beginning)
            assert not faults
            nats, count = nats + part, count + scored
        assert count == split.index["samples"].sum()
        assert nats == pytest.approx(expected, rel=1e-9)


def test_filler_alone_does_not_stop_a_run(train: Train) -> None:
    """A batch in which all passages have ended scores nothing, updates nothing, and is no fault.

    Mutation: in `train`, `unscored = 0 if count else unscored + 1`.
    """
    one_row = ["--train.batch_size", "1", "--data.carry", "6", "--seed", "1"]
    lines = train("run", *one_row, "--train.max_bad_steps", "1")
    losses = [line["train/bits"] for line in lines if "train/bits" in line]
    assert losses.count(None) == 1
    assert len(losses) == 12
