"""Law 16 for recorded periods: the plain engine's ids, however calls cut them; and a period fit to be recorded.

No CUDA graph is made here, test_gpu.py does that. What one needs is checked on the CPU, where a tape of operations is
played again on the same memory, and on fake CUDA tensors, which refuse to tell the host anything.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device import RECIPES, assert_on, model_on, tensors
from test_native import LEVELS, REFERENCE, VARIANTS, model_of
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trained_like import relative

from sashimi.errors import InputError, Unavailable
from sashimi.foreign.importer import import_checkpoint
from sashimi.graph import Graph, recorded
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import build_model, load_weights
from sashimi.parsing import to_dict
from sashimi.sampler import Drawing, Plain, draw, generate, make_engine

CALLS = (1, 15, 16, 17, 33, 40)
DRAWS: tuple[dict, ...] = ({}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6, "temperature": 1.5})


def graph_of(model: Sashimi, batch_size: int, **settings: Any) -> Graph:
    return Graph(model, batch_size, partial(Plain, choose=partial(draw, **settings)), record=False)


def silence(batch_size: int) -> Tensor:
    return torch.full((batch_size,), LEVELS // 2)


def chance(batch_size: int, length: int) -> Tensor:
    return torch.rand(batch_size, length, generator=torch.manual_seed(1), dtype=torch.float64)


def in_calls(engine: Graph, model: Sashimi, u: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ids, nats and last state of calls of these lengths."""
    inputs, state, made = silence(len(u)), model.init_state(len(u)), []
    for piece in u.split(lengths, dim=1):
        ids, nats, state = engine(inputs, state, piece)
        inputs = ids[:, -1]
        made.append((ids, nats))
    ids, nats = (torch.cat(pieces, dim=1) for pieces in zip(*made, strict=True))
    return ids, nats, list(tensors(state.tier))


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations without the Python around them, done again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for there, new in zip(of(result), of(again), strict=True):
                if there.data_ptr() != new.data_ptr():  # else a view, or done in place
                    there.copy_(new)

    def read(self) -> set[int]:
        """Addresses of memory that the operations read without having made it."""
        made: set[int] = set()
        found = set()
        for _, args, kwargs, result in self.operations:
            found |= {t.untyped_storage().data_ptr() for t in of((args, kwargs))} - made
            made |= {t.untyped_storage().data_ptr() for t in of(result)} - found
        return found


def of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("played", [False, True], ids=["stepped", "played again"])
def test_periods_are_the_plain_steps(variant: str, batch_size: int, played: bool) -> None:
    """Law 16: plain ids, nats and state to the bit in calls of odd lengths, the steps run anew or a tape of them.

    Mutations: no `self.inputs.copy_`, in either place; `self.tier = state.tier` in `run`; start = 0; in
    `Pooled.step`, a block kept on `self` from slot to slot.
    """
    model = model_of(variant, torch.float64)
    u = chance(batch_size, sum(CALLS))
    with torch.inference_mode():
        expected_ids, expected_nats, state = Plain(model, draw)(silence(batch_size), model.init_state(batch_size), u)
    engine = graph_of(model, batch_size)
    if played:
        with torch.no_grad(), Tape() as tape:
            engine.run()
        engine.replay = tape.replay
    ids, nats, remembered = in_calls(engine, model, u, CALLS)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(nats, expected_nats)
    assert all(map(torch.equal, remembered, tensors(state.tier)))


@pytest.mark.parametrize("lengths", [(16,) * 4, (1,) * 64, (31, 33), (64,), (7, 48, 9)])
def test_cuts_do_not_matter(lengths: tuple[int, ...]) -> None:
    """Also where calls begin in every phase. Mutation: end = max(start, L // P * P)."""
    model, u = model_of("unet", torch.float64), chance(2, 64)
    expected = in_calls(graph_of(model, 2), model, u, (64,))
    ids, nats, state = in_calls(graph_of(model, 2), model, u, lengths)
    assert torch.equal(ids, expected[0])
    assert torch.equal(nats, expected[1])
    assert all(map(torch.equal, state, expected[2]))


def test_compiled_periods_are_the_plain_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law 16 with layers by torch.compile, also around whole periods, and the weights of its making.

    Mutations: in `Graph`, `compile_steps(model)`; `self.period = steps(model)`; no `compile_steps`.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, u = model_of("default", torch.float64), chance(2, sum(CALLS))
    with torch.inference_mode():
        expected_ids, expected_nats, _ = Plain(model, draw)(silence(2), model.init_state(2), u)
    with dynamo.patch(recompile_limit=8):
        engine = make_engine(model, Drawing(batch_size=2, engine="compiled"))
        assert engine.name == "compiled"
        assert isinstance(engine, Graph)
        assert list(tmp_path.rglob("*.so"))  # which it has made before it is first called
        assert "step" not in vars(model.tier.layers[0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        ids, nats, _ = in_calls(engine, model_of("default", torch.float64), u, CALLS)
    assert torch.equal(ids, expected_ids)
    assert relative(nats, expected_nats) < 1e-9


def test_what_cannot_be_compiled_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: in `Graph`, no `_try`."""

    def fail(function: Any, **_: Any) -> Any:
        def run(*_: Any) -> None:
            raise RuntimeError("no compiler\nof any kind")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(
        InputError, match="engine=compiled: its steps cannot be compiled: no compiler; leave it to auto"
    ):
        make_engine(model_of("default", torch.float64), Drawing(batch_size=2, engine="compiled"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nats_are_the_plain_ones_in_float32(variant: str) -> None:
    """Law 16, teacher-forced: the plain step on the engine's ids gives each of them its nats within 1e-4.

    Mutation: in `_frozen`, a model of fresh weights.
    """
    model, u = model_of(variant, torch.float32), chance(2, 50)
    with torch.inference_mode():
        inputs, state = silence(2), model.init_state(2)
        ids, nats, _ = graph_of(model, 2)(inputs, state, u)
        for t in range(50):
            logits, state = model.step(inputs, state)
            inputs = ids[:, t]
            own = torch.nn.functional.cross_entropy(logits.double(), inputs, reduction="none")
            assert (own - nats[:, t]).abs().max() < 1e-4


@pytest.mark.parametrize("settings", DRAWS)
def test_draws_are_as_asked_for(settings: dict) -> None:
    """Mutation: in `make_engine`, give `Graph` another `partial(Plain, choose=draw)`."""
    model = model_of("default", torch.float64)
    ids = [generate(model, 60, clips=range(2), engine=engine, **settings) for engine in ("graph", "plain")]
    assert torch.equal(*ids)


@pytest.mark.parametrize("name", ["s4_v2_youtubemix_release", "seed796_glu"])
def test_imported_models_have_periods_too(name: str) -> None:
    """Also those of other code's making, with a prompt. Mutation: `Sashimi(model.config)` as the frozen copy."""
    imported = import_checkpoint(next((REFERENCE / name).glob("*.pt")))
    model = build_model({"model": to_dict(imported.config), "format": imported.format}, name)
    load_weights(model, imported.tensors, name)
    prompt = torch.arange(5)
    ids = [generate(model.double(), 40, clips=range(2), prompt=prompt, engine=each) for each in ("graph", "plain")]
    assert torch.equal(*ids)


def test_memory_stays_where_it_is() -> None:
    """What is read and written lies at the same addresses in each period, and belongs to the engine for good.

    The weight of weight norm too, which is computed once, and not by `parametrize.cached`. Mutations: in `run`,
    `self.ids = ids`, or `self.nats = nats`; in `_frozen`, keep modules under weight norm.
    """
    model = model_of("original", torch.float32)

    def owned(engine: Graph) -> set[int]:
        plain = engine.steps
        assert isinstance(plain, Plain)
        held = (engine.tier, engine.inputs, engine.uniforms, engine.ids, engine.nats)
        held_too = (*plain.model.parameters(), *plain.model.buffers(), *vars_of(plain.model))
        return {t.untyped_storage().data_ptr() for t in (*of(held), *held_too)}

    def vars_of(model: Sashimi) -> Iterator[Tensor]:
        """Tensors that modules hold beside parameters and buffers."""
        for module in model.modules():
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))

    tapes = []
    with parametrize.cached():
        engine = graph_of(model, 2)
        for _ in range(2):
            with torch.no_grad(), Tape() as tape:
                engine.run()
            tapes.append(tape)
    assert tapes[0].read() == tapes[1].read()
    assert tapes[0].read() <= owned(engine)
    assert not any("weight_norm" in str(func) for func, *_ in tapes[0].operations)
    addresses = owned(engine)
    in_calls(engine, model, chance(2, 90), (35, 55))
    assert owned(engine) == addresses


def test_states_are_values() -> None:
    """A state can be gone on from twice, and another call leaves it as it was. Mutation: no `torch.clone`."""
    model, engine = model_of("default", torch.float32), graph_of(model_of("default", torch.float32), 2)
    first, second = chance(2, 64).split(32, dim=1)
    ids, _, state = engine(silence(2), model.init_state(2), first)
    before = [t.clone() for t in tensors(state.tier)]
    runs = [engine(ids[:, -1], state, second) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(map(torch.equal, before, tensors(state.tier)))


def test_an_engine_keeps_the_weights_of_its_making() -> None:
    """And leaves the model as it was, in training, with its weight norm; and no random number is drawn.

    Mutations: in `_frozen`, `own = model`, or `parametrize.remove_parametrizations`, or no `device="meta"`.
    """
    model = model_of("original", torch.float64).train()
    names, u, luck = list(model.state_dict()), chance(2, 40), torch.get_rng_state()
    engine = graph_of(model, 2)
    assert torch.equal(torch.get_rng_state(), luck)
    with torch.no_grad():
        state = model.eval().init_state(2)
        expected, _, _ = Plain(model, draw)(silence(2), state, u)
        model.train()
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(Plain(model, draw)(silence(2), state, u)[0], expected)
    assert torch.equal(engine(silence(2), state, u)[0], expected)
    assert list(model.state_dict()) == names
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- on fake CUDA tensors


class OnDevice(TorchDispatchMode):
    """Fails where an operation reads or makes a tensor elsewhere: a copy from or to the host would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elsewhere = {t.device.type for t in of((args, kwargs, result))} - {"cuda"}
        assert not elsewhere, f"{func} has to do with {elsewhere}"
        return result


@pytest.mark.parametrize(
    ("recipe", "settings"), [*((recipe, {}) for recipe in RECIPES), *(("sashimi", settings) for settings in DRAWS[1:])]
)
def test_a_period_asks_nothing_of_the_host(recipe: str, settings: dict) -> None:
    """All on the device, with every way of drawing, and no value, data-dependent shape or copy to the host or from it.

    Mutations: in `draw`, `if cdf.min() < 0: …`, or `* torch.tensor(1.0)`; in `_truncate`,
    `probs[probs > 0]`, or `likeliest[:, top_k:] = 0`.
    """
    with FakeTensorMode(), torch.no_grad():
        model = model_on("cuda", recipe)
        engine = graph_of(model, 2, **settings)
        u = torch.zeros(2, 3 + 32 + 5, dtype=torch.float64, device="cuda")
        inputs, state = torch.zeros(2, dtype=torch.int64, device="cuda"), model.init_state(2)
        with OnDevice():
            engine.run()
            assert_on("cuda", engine.tier, engine.inputs, engine.ids, engine.nats)
            for length in (3, 32, 5):
                ids, nats, state = engine(inputs, state, u[:, :length])
                assert_on("cuda", ids, nats, state)
                assert ids.shape == nats.shape == (2, length)


def test_the_check_of_periods_sees_what_it_should() -> None:
    """What the test above stands on: values asked for, and copies from the host, are errors."""
    with FakeTensorMode(), torch.no_grad():
        there = torch.zeros(3, device="cuda")
        with OnDevice():
            for wrong in (there.max().item, lambda: bool(there.any()), lambda: there[there > 0]):
                with pytest.raises(Exception, match=r"data-dependent|dynamic|_local_scalar|nonzero"):
                    wrong()
            with pytest.raises(AssertionError, match="cpu"):
                torch.tensor(1.0).to("cuda")


# --- where there is no graph


def test_what_cannot_be_recorded_is_unavailable() -> None:
    """For want of a GPU, or because the host waits for it: in one line, with its cause. Mutation: do not catch."""
    with pytest.raises(Unavailable, match=r"^no CUDA graph could be recorded: .") as caught:
        recorded(lambda: torch.ones(1, device="cuda").item(), torch.device("cuda"))
    assert "\n" not in str(caught.value)


def test_the_plain_engine_stands_in() -> None:
    """On CUDA with engine=auto, which is said; graph asked for by name is refused. Mutation: raise in either case."""
    with FakeTensorMode(), torch.device("cuda"):
        model = Sashimi(ModelConfig(levels=LEVELS, d_model=4, n_layers=1, d_state=2, pool=(8, 16, 16)))
    with pytest.warns(UserWarning, match="plain engine, the graph one is not to be had: its pooling has 2048 phases"):
        assert make_engine(model, Drawing()).name == "plain"
    with pytest.raises(InputError, match="engine=graph: its pooling has 2048 phases, more than 1024; leave it to auto"):
        make_engine(model, Drawing(engine="graph"))


def test_a_cpu_steps_through_periods_when_asked() -> None:
    """And takes native code when not. Mutation: in `make_engine`, no test of the device."""
    model = model_of("default", torch.float32)
    assert make_engine(model, Drawing(engine="graph")).name == "graph"
    assert make_engine(model, Drawing()).name == "native"
    periods = [
        make_engine(model_of(v, torch.float32), Drawing(engine="graph")) for v in ("default", "unet", "no-pooling")
    ]
    assert [engine.uniforms.shape[1] for engine in periods if isinstance(engine, Graph)] == [16, 18, 16]
