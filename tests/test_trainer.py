"""The loss of a step, what is skipped, what validation uses: laws 13 and 8 on one rank. See test_distributed.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import curve

from sashimi.checkpoint import load_checkpoint
from sashimi.distributed import Distributed
from sashimi.loss import nll
from sashimi.model import ModelConfig, Sashimi
from sashimi.optim import OptimConfig, Plateau
from sashimi.stream import AudioConfig, Batch, DataConfig, TrainingData
from sashimi.tracking import Tracker
from sashimi.trainer import Objective, RunState, TrainConfig, Trainer, evaluate

Train = Callable[..., list[dict]]


@pytest.fixture
def trainer(tiny_shards: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer over the tiny shards: micro-batches of `micro_batch` rows, 4 segments a step."""

    def make(micro_batch: int = 4, ema: float = 0.0, **config: int) -> Trainer:
        torch.manual_seed(0)
        data = DataConfig(str(tiny_shards), segment=512, workers=0)
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
    rows = [torch.cat(parts) for parts in zip(*(batch[:3] for batch in micro_batches), strict=True)]
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
    subject.step([batch._replace(mask=torch.zeros_like(batch.mask))], 0)
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
    samples = int(subject.data.valid_batches.dataset.split.recording_samples.sum())
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
    assert "error: data.on_damage=fatal, stopped and saved: " in capsys.readouterr().err
    steps = [int(path.name[5:]) for path in (tmp_path / "runs/fatal/checkpoints").iterdir()]
    assert steps
    assert max(steps) < 12
