"""The same results on a CUDA device as on the CPU; without one, test_device.py checks placement with fake tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import curve
from trained_like import relative, trained_like

from sashimi.checkpoint import load_checkpoint
from sashimi.model import ModelConfig, Sashimi
from sashimi.sampler import generate

pytestmark = pytest.mark.gpu


def test_logits_equal_the_cpus() -> None:
    """Forward and step in float32. Mutation: any tensor made without `device=`."""
    model = trained_like(Sashimi(ModelConfig(d_model=16, n_layers=2))).eval()
    inputs = torch.randint(0, 256, (2, 100))
    with torch.no_grad():
        expected = model(inputs)
        model.cuda()
        assert relative(model(inputs.cuda()).cpu(), expected) < 1e-4
        state, steps = model.init_state(2), []
        for sample in inputs.cuda().unbind(1):
            logits, state = model.step(sample, state)
            steps.append(logits.cpu())
    assert relative(torch.stack(steps, dim=1), expected) < 1e-4


def test_clips_are_reproducible() -> None:
    """Law 16 on the device: one clip alone has the bits that it has among others. Mutation: float32 uniforms."""
    model = trained_like(Sashimi(ModelConfig(d_model=16, n_layers=1))).cuda()
    clips = generate(model, 200, clips=range(4), batch_size=4)
    assert torch.equal(generate(model, 200, clips=[2], batch_size=4)[0], clips[2])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_in_each_precision(
    train: Callable[..., list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The loss falls, resuming goes on with the loss scale. Mutation: do not restore `loss_scale`."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    lines = train("run", "--train.keep_last", "9", "--train.steps", "40")
    bits = [value for _, name, value in curve(lines) if name == "valid/bits"]
    assert bits[-1] < bits[0] - 0.3
    folder = tmp_path / "runs/run/checkpoints"
    before = load_checkpoint(folder / "step-00000040").state["loss_scale"]
    resumed = train("run", "--train.steps", "40", "--resume", str(folder / "step-00000020"))
    assert [step for step, _, _ in curve(resumed)] == [step for step, _, _ in curve(lines)]
    assert load_checkpoint(folder / "step-00000040").state["loss_scale"] == before
    assert bool(before) == (precision == "fp16")
