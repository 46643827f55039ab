"""Layers by torch.compile: whole graphs, the same numbers, float32 where it must be."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, curve, launch, metrics
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo import config as dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from trained_like import relative, trained_like

from sashimi import s4
from sashimi.distributed import Distributed
from sashimi.layers import Residual, compile_layers
from sashimi.model import ModelConfig, Sashimi
from sashimi.objective import Objective
from sashimi.optim import OptimConfig
from sashimi.stream import AudioConfig, DataConfig, TrainingData
from sashimi.trainer import TrainConfig, Trainer

SMALL = ModelConfig(levels=16, d_model=8, n_layers=2, d_state=8, pool=(2, 2))
KINDS = 2 * 3  # S4 and feed-forward layers, of three tiers


@pytest.fixture
def graphs() -> Iterator[list[fx.GraphModule]]:
    """For what is compiled, forward and backward."""
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(recompile_limit=8), functorch.patch(backward_pass_autocast="same_as_forward"):
        yield []
    torch._dynamo.reset()


def products(graph: fx.GraphModule) -> list[torch.dtype]:
    """The dtypes of the FFTs, batched products and scans that state spaces make."""
    made = [
        node.meta["val"]
        for node in graph.graph.nodes
        if node.op == "call_function"
        and any(name in str(node.target) for name in ("fft", "bmm", "scan"))
        and "/s4.py" in (node.stack_trace or "")
    ]
    return [tensor.dtype for value in made for tensor in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize(
    ("form", "bfloat16"),
    [("chunks", False), ("convolution", False), ("carried", False), ("chunks", True), ("convolution", True)],
)
@pytest.mark.usefixtures("scans")
def test_layers_are_whole_graphs(
    form: str, bfloat16: bool, graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph, forward and backward, for each kind of layer of each tier; nats and gradients are those without.

    Law 5 holds in the graphs, backward ones included. Mutations: in `S4.forward`, a print, or `enabled=True`; in
    `compile_layers`, drop `backward_pass_autocast`, `recompile_limit` or `dynamic=False`.
    """
    monkeypatch.setattr(s4, "in_chunks", lambda device: form == "chunks")
    torch.manual_seed(0)
    plain = trained_like(Sashimi(SMALL), scale=0.1)
    plain = plain if bfloat16 else plain.double()
    compiled = Sashimi(SMALL).to(next(plain.parameters()).dtype)
    compiled.load_state_dict(plain.state_dict())

    def compiler(graph: fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compile_layers(compiled, aot_autograd(fw_compiler=compiler))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(16, (2, 49))
    mask = torch.ones(2, 48, dtype=torch.bool)

    def nats(model: Sashimi) -> Tensor:
        objective = Objective(model, carry=form == "carried")
        carried = tuple(tensor.expand(2, *tensor.shape[1:]) for tensor in objective.beginning)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            result = objective(ids[:, :-1], ids[:, 1:], mask, *carried)
        return result[0] if carried else result

    tolerance = 2e-2 if bfloat16 else 1e-12
    results = []
    for model in (plain, compiled):
        value = nats(model)
        gradient = torch.autograd.grad(value, list(model.parameters()))
        with torch.no_grad():
            results.append((value, nats(model), torch.cat([g.flatten() for g in gradient])))
    for expected, actual in zip(*results, strict=True):
        assert relative(actual, expected) < tolerance
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2 * KINDS
    assert len(graphs) == 3 * KINDS
    found = [dtype for graph in graphs for dtype in products(graph)]
    assert len(found) > 3 * KINDS
    assert set(found) <= ({torch.float32, torch.complex64} if bfloat16 else {torch.float64, torch.complex128})


MODEL = ["--model.pool", "[]", "--model.d_model", "4", "--model.d_state", "4", "--model.n_layers", "1"]
STEPS = ["--train.steps", "3", "--train.batch_size", "2", "--optim.ema", "0.5", "--track.log_every", "1"]


def small_run(shards: Path, runs: Path, name: str, compiled: bool) -> list[str]:
    """Three steps and two validations of a very small model."""
    data = ["--data.shards", str(shards), "--data.segment", "64", "--data.workers", "0"]
    audio = ["--audio.sample_rate", "8000", "--audio.quantizer", "mu-law", "--track.audio_every", "0"]
    train = ["--train.compile", str(compiled).lower(), "--train.recompute", str(compiled).lower()]
    return ["--name", name, "--runs", str(runs), *MODEL, *data, *audio, *STEPS, *train]


def test_training_compiled(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of `train.compile`, of two ranks that compute layers once more and validate averaged weights, are
    those without. Mutation: in `Trainer.__init__`, drop the call.
    """
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    for name, compiled in (("plain", False), ("compiled", True)):
        run = launch(2, "launch/train.py", small_run(tiny_shards, tmp_path, name, compiled))
        assert run.returncode == 0, run.stderr[-2000:]
    plain, compiled = (curve(metrics(tmp_path / name)) for name in ("plain", "compiled"))
    assert len(plain) == 5
    assert [point[:2] for point in compiled] == [point[:2] for point in plain]
    assert [bits for *_, bits in compiled] == pytest.approx([bits for *_, bits in plain], rel=1e-5)
    assert list(cache.rglob("*.so"))  # by which it was compiled


def test_averaged_weights_are_compiled_too(tiny_shards: Path, tmp_path: Path) -> None:
    """They are what is validated. Mutation: in `Trainer.__init__`, compile the model alone."""
    data = TrainingData(DataConfig(str(tiny_shards), segment=512, workers=0), AudioConfig(8000), 0, 4, 4)
    config, optim = TrainConfig(compile=True), OptimConfig(ema=0.9)
    with dynamo.patch(recompile_limit=8), functorch.patch(backward_pass_autocast="same_as_forward"):
        trainer = Trainer(Distributed(), Sashimi(SMALL), data, config, optim, 0, {}, tmp_path)
    assert trainer.ema is not None
    for model in (trainer.model, trainer.ema.module):
        layers = [module for module in model.modules() if isinstance(module, Residual)]
        assert all(layer._compiled_call_impl for layer in layers)


def test_without_a_compiler(tiny_shards: Path, tmp_path: Path) -> None:
    """One line says what is missing. Mutation: in `distributed._mendable`, drop the case."""
    command = [sys.executable, str(ROOT / "launch/train.py"), *small_run(tiny_shards, tmp_path, "run", True)]
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == (
        "error: train.compile=true: cannot compile (InvalidCxxCompiler): install a C++ compiler (g++), "
        "and on GPUs Triton, or set it to false"
    )
