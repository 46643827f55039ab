"""What recording a training step's passes must not change, on CPUs: test_gpu.py records them.

`static_memory` stands in for CUDA graphs. Like them, it takes inputs, outputs and gradients from and to memory that
stays where it is, and computes anew in it what is passed in.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trained_like import relative, trained_like

from sashimi.distributed import Distributed
from sashimi.errors import Unavailable
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective
from sashimi.optim import OptimConfig
from sashimi.recording import record
from sashimi.stream import AudioConfig, DataConfig, TrainingData
from sashimi.trainer import TrainConfig, Trainer

SMALL = ModelConfig(levels=16, d_model=8, n_layers=1, d_state=8, pool=(2, 2))
SIZE = (2, 16)

plain_autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)


def static_memory(module: Objective, inputs: tuple[Tensor, ...]) -> None:
    """As torch.cuda.make_graphed_callables, with its conditions."""
    assert not torch.is_autocast_enabled("cpu")  # a backward pass is recorded too, which is never under autocast
    assert module.training
    forward = module.forward
    parameters = tuple(p for p in module.parameters() if p.requires_grad)
    first = forward(*inputs)
    outputs = [o.detach().clone() for o in ((first,) if isinstance(first, Tensor) else first)]
    gradients = [torch.empty_like(p) for p in parameters]

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, ...]:
            for static, argument in zip(inputs, arguments, strict=False):
                static.copy_(argument)
            with torch.enable_grad():
                made = forward(*inputs)
            made = (made,) if isinstance(made, Tensor) else made
            ctx.nats = made[0]
            for static, tensor in zip(outputs, made, strict=True):
                static.copy_(tensor.detach())
            return tuple(o.detach() for o in outputs)

        @staticmethod
        def backward(ctx: Any, d_nats: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            for static, g in zip(gradients, torch.autograd.grad(ctx.nats, parameters, d_nats), strict=True):
                static.copy_(g)
            return *(None for _ in inputs), *(g.detach() for g in gradients)

    def run(*arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not module.training:
            return forward(*arguments)
        made = Replayed.apply(*arguments, *parameters)
        return made[0] if isinstance(first, Tensor) else made

    module.forward = run  # type: ignore[method-assign]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", static_memory)


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(16, (SIZE[0], SIZE[1] + 1), generator=torch.manual_seed(seed))
    return ids[:, :-1].clone(), ids[:, 1:].clone(), torch.rand(SIZE, generator=torch.manual_seed(seed)) < 0.7


def objective(carry: bool = False) -> Objective:
    torch.manual_seed(0)
    return Objective(trained_like(Sashimi(SMALL)).double(), carry=carry)


def beginning(made: Objective) -> tuple[Tensor, ...]:
    return tuple(t.expand(SIZE[0], *t.shape[1:]).clone() for t in made.beginning)


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_law_13_passes_add_up(carry: bool, passes: int) -> None:
    """Losses, gradients and states of several passes are those of passes that are not recorded, and all are kept.

    Mutations: in `record`, no `outputs.clone()`, no `.detach()`, no `.detach().clone()`, or no
    `register_hook`.
    """
    plain, recorded = objective(carry), objective(carry)
    record(recorded, (*batch(9), *beginning(recorded)), plain_autocast, accumulate=passes > 1)
    results = []
    for made in (plain, recorded):
        after: tuple[Tensor, ...] = beginning(made)
        kept = []
        for i in range(passes):
            out = made(*batch(i), *after)
            nats, *after = out if carry else (out,)
            (nats / 10).backward()
            kept += [nats.detach(), *after]
        results.append(kept + [p.grad for p in made.parameters()])
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 1e-12


@pytest.mark.usefixtures("recorder")
def test_evaluation_is_of_any_size() -> None:
    """Mutation: in `record`, no `objective.train()`, so that evaluation is what is recorded."""
    plain, recorded = objective().eval(), objective().eval()
    record(recorded, batch(9), plain_autocast, accumulate=False)
    recorded.eval()
    longer = [torch.cat((t, t), dim=1) for t in batch(1)]
    assert relative(recorded(*longer), plain(*longer)) < 1e-12


@pytest.mark.usefixtures("recorder")
def test_law_5_precision_is_of_the_forward_pass() -> None:
    """Mutation: in `record`, `make_graphed_callables` within `autocast()`, or none."""
    entered = []

    @contextmanager
    def autocast() -> Iterator[None]:
        entered.append(True)
        with torch.autocast("cpu", torch.bfloat16):
            yield

    recorded = Objective(trained_like(Sashimi(SMALL)))
    dtypes = []
    recorded.model.head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    record(recorded, batch(9), autocast, accumulate=False)
    recorded(*batch(1)).backward()
    assert len(entered) == 2
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("carry", [0, 3])
def test_a_trainer_records_passes_of_its_batches(
    carry: int, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two micro-batches; and what cannot be recorded is said.

    Mutations: in `Trainer._record`, no `*carried`, `accumulate=False`, or no `except`.
    """
    data = DataConfig(str(tiny_shards), segment=512, workers=0, carry=carry)
    audio = AudioConfig(8000, quantizer="mu-law")
    losses = []
    for recorder in (None, static_memory, _fail):
        torch.manual_seed(0)
        model = Sashimi(replace(SMALL, levels=256, pool=(4, 4)))
        batches = TrainingData(data, audio, 0, batch_size=4, micro_batch=2)
        trainer = Trainer(Distributed(), model, batches, TrainConfig(), OptimConfig(), 0, {}, tmp_path)
        assert isinstance(trainer.objective, Objective)
        if recorder is not None:
            monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
            with pytest.warns(UserWarning, match="kernel by kernel, no CUDA") if recorder is _fail else nullcontext():
                trainer._record(trainer.objective)
        trainer.rehearse()
        losses.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert relative(losses[1], losses[0]) < 1e-4
    assert torch.equal(losses[2], losses[0])


@pytest.mark.parametrize(
    ("model", "train", "reason"),
    [
        ({"dropout": 0.1}, {"recompute": True}, "dropout that is drawn once more"),
        ({"kernel": "cauchy_keops"}, {}, "PyKeOps waits"),
    ],
)
def test_what_would_go_wrong_is_not_recorded(
    model: dict, train: dict, reason: str, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recomputed layer draws other random numbers in another graph; PyKeOps launches on a stream of its own.

    Mutation: in `Trainer._record`, drop either.
    """
    data = TrainingData(DataConfig(str(tiny_shards), segment=512, workers=0), AudioConfig(8000), 0, 4, 4)
    settings = replace(SMALL, levels=256, **model)
    trainer = Trainer(Distributed(), Sashimi(settings), data, TrainConfig(**train), OptimConfig(), 0, {}, tmp_path)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", _never)
    with pytest.warns(UserWarning, match=f"kernel by kernel, {reason}"):
        trainer._record(trainer.objective)  # type: ignore[arg-type]


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by steps that are launched one by one. Mutation: in `record`, no `except torch.OutOfMemoryError`."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(torch.OutOfMemoryError):
        record(objective(), batch(9), _never, accumulate=False)


def _fail(*_: Any) -> None:
    """As a recording that is cut short, which fails once more as it ends."""
    try:
        raise RuntimeError("no CUDA\nand more")
    finally:
        raise RuntimeError("the recording was cut short")


def test_what_cannot_be_recorded_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its first cause is named.

    Mutations: in `record`, no `del objective.forward`; in `first_reason`, `str(error)`.
    """
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", _fail)
    made = objective()
    with pytest.raises(Unavailable, match=r"^no CUDA graph could be recorded: no CUDA$"):
        record(made, batch(9), _never, accumulate=True)
    assert relative(made(*batch(1)), objective()(*batch(1))) == 0


def _never(*_: Any) -> Any:
    raise AssertionError
