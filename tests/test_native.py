"""Law 16 for native code: the plain engine's ids and states, whatever the model, the batch and the phase."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trained_like import relative, trained_like

from sashimi.errors import InputError
from sashimi.foreign.importer import import_checkpoint
from sashimi.model import ModelConfig, Sashimi, TierState
from sashimi.model_folder import build_model, load_weights
from sashimi.native import library as native_library
from sashimi.native.engine import Native
from sashimi.native.library import library
from sashimi.parsing import to_dict
from sashimi.sampler import Drawing, Plain, draw, generate, make_engine

REFERENCE = Path(__file__).parent / "reference"
LEVELS = 32
VARIANTS: dict[str, dict] = {
    "default": {},
    "no-glu": {"glu": False},
    "unet": {"unet": True, "pool": (2, 3)},
    "original": {"norm": "scalar", "weight_norm": True, "dt_transform": "softplus"},
    "untied": {"tie_state": False, "pool": (4,)},
    "diagonal": {"mode": "diag", "kernel": "vandermonde"},
    "no-pooling": {"pool": (), "ff": 3},
}


def model_of(variant: str, dtype: torch.dtype) -> Sashimi:
    """Widths that fill no vector: 10, 20 and 40 channels."""
    torch.manual_seed(0)
    config = {"levels": LEVELS, "d_model": 10, "n_layers": 2, "pool": (2, 2), "d_state": 6, **VARIANTS[variant]}
    return trained_like(Sashimi(ModelConfig(**config)).eval(), scale=0.2).to(dtype)


def tensors(state: TierState) -> list[Tensor]:
    """All that a tier remembers."""
    found = [layer.x for layer in (*state.down, *state.layers) if layer is not None]
    if state.pooled is not None:
        found += [state.pooled.pending, state.pooled.current, *tensors(state.pooled.tier)]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 3, 5, 17])
def test_native_ids_are_the_plain_ones_in_float64(variant: str, batch_size: int) -> None:
    """Law 16: from a state in the midst of a block, the same ids, nats to 1e-12, state to 1e-12; and on from there.

    Mutations: in generate.cpp, no `weight(p + 3 * step) * dot`, or `units(op.n_out)` -> `op.n_out` in add; in
    `_place_pooled`, `up` without `transpose`; in `_run_tier`, `phase // p` -> `phase`.
    """
    model, length = model_of(variant, torch.float64), 38
    plain, compiled = Plain(model, draw), Native(model, batch_size, 1.0, 0, 1.0)
    u = torch.rand(batch_size, 5 + 2 * length, generator=torch.manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        ids, _, start = plain(torch.full((batch_size,), LEVELS // 2), model.init_state(batch_size), u[:, :5])
        expected_ids, expected_nats, expected = plain(ids[:, -1], start, u[:, 5:])
        first, first_nats, middle = compiled(ids[:, -1], start, u[:, 5 : 5 + length])
        second, second_nats, state = compiled(first[:, -1], middle, u[:, 5 + length :])
    assert torch.equal(torch.cat((first, second), dim=1), expected_ids)
    assert relative(torch.cat((first_nats, second_nats), dim=1), expected_nats) < 1e-12
    assert state.phase == expected.phase
    for actual, wanted in zip(tensors(state.tier), tensors(expected.tier), strict=True):
        assert relative(actual, wanted) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_size", [2, 16])
def test_native_logits_are_the_plain_ones_in_float32(variant: str, batch_size: int) -> None:
    """Law 16, teacher-forced: the plain step on native ids gives each of them the native nats within 1e-4.

    Mutation: in activations.h, `ERF_END = 4` -> `2`.
    """
    model = model_of(variant, torch.float32)
    u = torch.rand(batch_size, 50, generator=torch.manual_seed(2), dtype=torch.float64)
    with torch.inference_mode():
        inputs, state = torch.full((batch_size,), LEVELS // 2), model.init_state(batch_size)
        ids, nats, _ = Native(model, batch_size, 1.0, 0, 1.0)(inputs, state, u)
        for t in range(50):
            logits, state = model.step(inputs, state)
            inputs = ids[:, t]
            own = torch.nn.functional.cross_entropy(logits.double(), inputs, reduction="none")
            assert (own - nats[:, t]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 1.5, "top_k": 9, "top_p": 0.8}]
)
@pytest.mark.parametrize("clips", [2, 5])
def test_native_draws_as_draw_does(settings: dict, clips: int) -> None:
    """The same ids with every way of drawing. Mutations: no `/ how.temperature`; `stable_sort` by `<`."""
    model = model_of("default", torch.float64)
    native_ids, plain_ids = (
        generate(model, 60, clips=range(clips), engine=engine, **settings) for engine in ("native", "plain")
    )
    assert torch.equal(native_ids, plain_ids)


@pytest.mark.parametrize(("name", "engine"), [("s4_v2_youtubemix_release", "native"), ("seed796_glu", "plain")])
def test_imported_models_run_natively_or_plainly(name: str, engine: str) -> None:
    """The original's unconstrained state matrix runs natively; layers of other code's making are left to `step`.

    Mutation: in `_place_layers`, `isinstance(layer, ...)` instead of `type(layer) is ...`.
    """
    imported = import_checkpoint(next((REFERENCE / name).glob("*.pt")))
    model = build_model({"model": to_dict(imported.config), "format": imported.format}, name)
    load_weights(model, imported.tensors, name)
    expected = nullcontext() if engine == "native" else pytest.warns(UserWarning, match="not to be had: it has no")
    with expected:
        assert make_engine(model, Drawing()).name == engine
    ids = [generate(model.double(), 40, clips=range(2), engine=each) for each in (engine, "plain")]
    assert torch.equal(*ids)


def test_without_a_compiler_the_plain_engine_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which is said; and native, asked for by name, is refused in one line. Mutation: raise in either case."""
    monkeypatch.setenv("PATH", str(tmp_path))
    library.cache_clear()
    model = model_of("default", torch.float32)
    with pytest.warns(UserWarning, match="there is no C\\+\\+ compiler"):
        assert make_engine(model, Drawing()).name == "plain"
    with pytest.raises(InputError, match="engine=native: there is no C\\+\\+ compiler; leave it to auto"):
        generate(model, 4, engine="native")
    library.cache_clear()


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And kept for other processes; a damaged one is made anew, and where none can be kept there is one all the same.

    Mutations: compile whether or not the file exists; the first or the second `suppress` of nothing.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    stamps = []
    for _ in range(2):
        library.cache_clear()
        library("generate")
        (made,) = (tmp_path / ".cache/sashimi").iterdir()
        stamps.append(made.stat().st_mtime_ns)
    assert stamps[0] == stamps[1]
    damaged = tmp_path / "other/.cache/sashimi" / made.name  # as a power cut may leave it
    damaged.parent.mkdir(parents=True)
    damaged.touch()
    for home in ("other", "/proc/nowhere"):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        library.cache_clear()
        assert library("generate").many_float
    assert damaged.stat().st_size == made.stat().st_size
    library.cache_clear()


def test_a_changed_header_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mutation: `texts` of the source alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "library.py"))
    (tmp_path / "number.cpp").write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }\n')
    for number in (1, 2):
        (tmp_path / "number.h").write_text(f"#define NUMBER {number}\n")
        library.cache_clear()
        assert library("number").number() == number
    library.cache_clear()
