"""The same results on a CUDA device as on the CPU; without one, test_device.py checks placement with fake tensors."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import curve
from test_graph import DRAWS
from test_native import LEVELS, VARIANTS, model_of
from torch import Tensor
from torch.nn.utils import parametrize
from trained_like import relative, trained_like

from sashimi.checkpoint import load_checkpoint
from sashimi.errors import Unavailable
from sashimi.graph import Graph, recorded
from sashimi.model import ModelConfig, Sashimi, SashimiState
from sashimi.objective import Objective
from sashimi.sampler import Drawing, Plain, draw, generate, make_engine

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


def on_gpu(variant: str, dtype: torch.dtype, batch_size: int) -> tuple[Sashimi, SashimiState, Tensor, Tensor]:
    """A model, its first state and sample, and uniforms of three periods and a bit."""
    model = model_of(variant, dtype).cuda()
    u = torch.rand(batch_size, 59, generator=torch.manual_seed(1), dtype=torch.float64).cuda()
    return model, model.init_state(batch_size), torch.full((batch_size,), LEVELS // 2, device="cuda"), u


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("settings", DRAWS)
def test_recorded_periods_are_the_plain_steps(variant: str, batch_size: int, settings: dict) -> None:
    """Law 16 for CUDA graphs: the ids of what is recorded, of the same not recorded, and the plain ones, in float64.

    In float32 they are the same whenever they are asked for, and score as the plain step scores them. The graph
    outlives the weights that it was recorded with. Mutations: no `self.inputs.copy_` in `run`; `_frozen` of nothing.
    """
    plain = partial(Plain, choose=partial(draw, **settings))
    with torch.inference_mode():
        model, state, silence, u = on_gpu(variant, torch.float64, batch_size)
        expected, expected_nats, _ = plain(model)(silence, state, u)
        for record in (True, False):
            engine = Graph(model, batch_size, plain, record=record)
            assert engine.name == "graph"
            inputs, now, made = silence, state, []
            for piece in u.split((5, 54), dim=1):
                ids, nats, now = engine(inputs, now, piece)
                inputs = ids[:, -1]
                made.append((ids, nats))
            ids, nats = (torch.cat(pieces, dim=1) for pieces in zip(*made, strict=True))
            assert torch.equal(ids, expected)
            assert relative(nats, expected_nats) < 1e-9

        model, state, silence, u = on_gpu(variant, torch.float32, batch_size)
        with parametrize.cached():
            engine = Graph(model, batch_size, plain)
        ids, nats, _ = engine(silence, state, u)
        del model  # and memory is written where something of the recording may have been freed
        rubbish = [torch.full((1 << 20,), 1e9, device="cuda") for _ in range(20)]
        again, again_nats, _ = engine(silence, state, u)
        assert torch.equal(again, ids)
        assert torch.equal(again_nats, nats)
        del rubbish
        model = model_of(variant, torch.float32).cuda()
        inputs = silence
        for t in range(u.shape[1]):
            logits, state = model.step(inputs, state)
            inputs = ids[:, t]
            own = torch.nn.functional.cross_entropy(logits.double(), inputs, reduction="none")
            assert (own - nats[:, t]).abs().max() < 1e-4


def test_compiled_periods_are_the_plain_steps() -> None:
    """Law 16 for graphs of compiled layers, in float64. Mutation: in `Graph`, `self.period = steps(model)`."""
    with torch.inference_mode():
        model, state, silence, u = on_gpu("default", torch.float64, 3)
        expected, expected_nats, _ = Plain(model, draw)(silence, state, u)
        engine = make_engine(model, Drawing(batch_size=3, engine="compiled"))
        ids, nats, _ = engine(silence, state, u)
    assert engine.name == "compiled"
    assert torch.equal(ids, expected)
    assert relative(nats, expected_nats) < 1e-9


@pytest.mark.parametrize("settings", DRAWS)
@pytest.mark.parametrize("record", [True, False])
def test_nothing_waits_for_a_sample(settings: dict, record: bool) -> None:
    """An engine's call never waits for the device. Mutation: `if cdf.min() < 0: …` in `draw`."""
    with torch.inference_mode():
        model, state, silence, u = on_gpu("default", torch.float32, 2)
        engine = Graph(model, 2, partial(Plain, choose=partial(draw, **settings)), record=record)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine(silence, state, u)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_recording_that_fails_harms_nothing() -> None:
    """Its cause is named, the stream is what it was, and the next recording succeeds.

    Mutation: in `first_reason`, `str(error)`.
    """
    stream = torch.cuda.current_stream()
    with pytest.raises(Unavailable, match=r"^no CUDA graph could be recorded: .*captur"):
        recorded(lambda: torch.ones(1, device="cuda").item(), torch.device("cuda", 0))
    assert torch.cuda.current_stream() == stream
    model = model_of("default", torch.float32).cuda()
    assert make_engine(model, Drawing(batch_size=2)).name == "graph"
    ids = [generate(model, 40, clips=range(2), engine=engine) for engine in ("auto", "graph")]
    assert torch.equal(*ids)


@pytest.fixture(params=["no", "bf16", "fp16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, accelerate_anew: None) -> str:
    """Of training in this process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", request.param)
    return request.param


def test_training_in_each_precision(
    train: Callable[..., list[dict]], tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    """The loss falls, resuming goes on with the loss scale. Mutation: do not restore `loss_scale`."""
    lines = train("run", "--train.keep_last", "9", "--train.steps", "40")
    assert f"on 1 x cuda, precision {precision}" in capsys.readouterr().err
    bits = [value for _, name, value in curve(lines) if name == "valid/bits"]
    assert bits[-1] < bits[0] - 0.3
    folder = tmp_path / "runs/run/checkpoints"
    before = load_checkpoint(folder / "step-00000040").state["loss_scale"]
    resumed = train("run", "--train.steps", "40", "--resume", str(folder / "step-00000020"))
    assert [step for step, _, _ in curve(resumed)] == [step for step, _, _ in curve(lines)]
    assert load_checkpoint(folder / "step-00000040").state["loss_scale"] == before
    assert bool(before) == (precision == "fp16")


OPTIONS = {
    "whole batch": [],
    "accumulated": ["--train.micro_batch", "1"],
    "carried": ["--data.carry", "3", "--train.micro_batch", "2", "--audio.quantizer", "mu-law"],
    "recomputed": ["--train.recompute", "true"],
    "averaged": ["--optim.ema", "0.9"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_recorded_steps_train_as_others(
    train: Callable[..., list[dict]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    precision: str,
) -> None:
    """The losses of `train.graph` are those without, and it is what is run.

    Mutations: in `record`, no `outputs.clone()` or no `register_hook` (accumulated), no `.detach()` (carried), or
    `make_graphed_callables` under autocast.
    """
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    curves = []
    for graph in (False, True):
        replays.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r"train\.graph")
            lines = train(f"graph-{graph}", *OPTIONS[options], "--train.graph", str(graph).lower())
        assert f"on 1 x cuda, precision {precision}" in capsys.readouterr().err
        curves.append(curve(lines))
        assert len(replays) == graph * 2 * 12 * {"accumulated": 4, "carried": 2}.get(options, 1)
    plain, recorded = curves
    assert [point[:2] for point in recorded] == [point[:2] for point in plain]
    bits = [[bits for *_, bits in points] for points in curves]
    assert bits[1] == pytest.approx(bits[0], rel=1e-5 if precision == "no" else 1e-2)


def test_law_12_with_recorded_dropout(train: Callable[..., list[dict]], tmp_path: Path) -> None:
    """Random numbers are a step's own, recorded or not. Mutation: in `Trainer.step`, no `manual_seed`."""
    lines = train("run", "--model.dropout", "0.3", "--train.keep_last", "9")
    checkpoint = tmp_path / "runs/run/checkpoints/step-00000004"
    resumed = train("run", "--model.dropout", "0.3", "--resume", str(checkpoint))
    assert [bits for *_, bits in curve(resumed)] == pytest.approx([bits for *_, bits in curve(lines)], rel=1e-5)
    other = train("other", "--model.dropout", "0")
    assert curve(other) != curve(lines)


def test_steps_that_cannot_be_recorded_are_launched(
    train: Callable[..., list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and nothing is harmed. Mutation: in `Trainer._record`, no `except`."""
    lines = train("run", "--train.graph", "false")
    forward = Objective.forward

    def waits(objective: Objective, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        assert float(inputs[0].sum()) >= 0
        return forward(objective, *inputs)

    monkeypatch.setattr(Objective, "forward", waits)
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match=r"train\.graph: steps are launched kernel by kernel, no CUDA graph .*captur"):
        same = train("waiting")
    assert torch.cuda.current_stream() == stream
    assert [bits for *_, bits in curve(same)] == pytest.approx([bits for *_, bits in curve(lines)], rel=1e-5)
