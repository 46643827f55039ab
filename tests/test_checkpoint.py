"""Checkpoints: whole or absent, found, kept and refused as law 14 says; model folders that load or say why not."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import powerless
from torch import Tensor, nn

from sashimi import checkpoint, model_folder, parsing
from sashimi.audio import AudioConfig
from sashimi.errors import InputError
from sashimi.foreign import legacy
from sashimi.model import ModelConfig, Sashimi

MODEL = ModelConfig(d_model=4, n_layers=1, pool=(2,), d_state=4)
CONFIG: dict[str, Any] = {
    "seed": 1,
    "data": {"shards": "shards/demo", "segment": 64, "workers": 2},
    "audio": parsing.to_dict(AudioConfig()),
    "model": parsing.to_dict(MODEL),
    "train": {"steps": 10},
}


def tensors(step: int) -> dict[str, Tensor]:
    """Weights that tell which step they are of, of several shapes and types."""
    return {"a": torch.full((3, 2), float(step)), "b": torch.tensor(step), "c": torch.rand(5, dtype=torch.float64)}


def save(folder: Path, step: int, **more: Any) -> Path:
    """A small checkpoint of `step`."""
    return checkpoint.save_checkpoint(
        folder, step, tensors(step), {"a/step": torch.tensor(1.0)}, {"position": 8 * step}, CONFIG, **more
    )


def damage(folder: Path) -> None:
    """Cut the weights short, as a full disk or a broken copy does."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def silent(line: str) -> None:
    """A log that nobody reads."""


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- saving and loading


@pytest.mark.parametrize("ema", [None, {"a": torch.tensor([0.5])}])
def test_what_is_saved_comes_back(tmp_path: Path, ema: dict[str, Tensor] | None) -> None:
    """Law 12. Tensors bit-equal, with their shapes and types; state and config as JSON; nothing else in the folder.

    Mutation: leave ema out of `files`.
    """
    transposed = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    weights = tensors(3) | {"transposed": transposed}
    folder = checkpoint.save_checkpoint(tmp_path, 3, weights, {}, {"position": 24}, CONFIG, ema)
    assert folder == tmp_path / "step-00000003"
    loaded = checkpoint.load_checkpoint(folder)
    assert loaded.step == 3
    assert loaded.state == {"position": 24}
    assert loaded.config == CONFIG
    assert loaded.optimizer == {}
    assert loaded.model.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(loaded.model[name], value)
        assert loaded.model[name].dtype == value.dtype
    assert (loaded.ema is None) == (ema is None)
    assert kept(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("spoil", [damage, remove_manifest, None])
def test_saving_a_step_again_replaces_it(tmp_path: Path, spoil: Any) -> None:
    """A damaged folder of that name must not stop the save. Mutation: raise if the folder exists."""
    folder = save(tmp_path, 3)
    if spoil:
        spoil(folder)
    checkpoint.save_checkpoint(tmp_path, 3, tensors(7), {}, {}, CONFIG)
    assert torch.equal(checkpoint.load_checkpoint(folder).model["b"], torch.tensor(7))
    assert kept(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "state.json"])
def test_a_damaged_checkpoint_is_not_loaded(tmp_path: Path, name: str) -> None:
    """Law 14. The error names the file. Mutation: drop the verification from `load_checkpoint`."""
    folder = save(tmp_path, 3)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: SHA-256"):
        checkpoint.load_checkpoint(folder)


# ---- resuming


def test_auto_takes_the_newest_whole_one_and_says_what_it_passed_over(tmp_path: Path) -> None:
    """Law 14. Newest by step number, not by date or by name. Mutation: sort `_steps` the other way."""
    lines: list[str] = []
    for step in (100_000_000, 3, 20, 1):
        save(tmp_path, step)
    damage(tmp_path / "step-100000000")
    (tmp_path / ".tmp-step-00000021").mkdir()
    assert checkpoint.find_resume(tmp_path, "auto", lines.append) == tmp_path / "step-00000020"
    (line,) = lines
    assert "step-100000000/model.safetensors" in line
    remove_manifest(tmp_path / "step-00000020")
    assert checkpoint.find_resume(tmp_path, "auto", lines.append) == tmp_path / "step-00000003"
    assert len(lines) == 3


def test_auto_never_starts_from_scratch_beside_damaged_checkpoints(tmp_path: Path) -> None:
    """Law 14. Checkpoints, none of them whole: stop. Mutation: return None there."""
    for step in (1, 2):
        damage(save(tmp_path, step))
    with pytest.raises(InputError, match="none of its 2 checkpoints is whole"):
        checkpoint.find_resume(tmp_path, "auto", silent)


@pytest.mark.parametrize("leftover", [False, True])
def test_auto_starts_where_there_is_no_checkpoint(tmp_path: Path, leftover: bool) -> None:
    """Law 14. An interrupted first save is no checkpoint; starting is logged. Mutation: glob("*step-*")."""
    lines: list[str] = []
    if leftover:
        (tmp_path / ".tmp-step-00000001").mkdir()
    assert checkpoint.find_resume(tmp_path / ("" if leftover else "checkpoints"), "auto", lines.append) is None
    assert "starting from step 0" in lines[0]


def test_never_does_not_write_over_checkpoints(tmp_path: Path) -> None:
    """The error offers both ways out. Mutation: return None whatever is there."""
    assert checkpoint.find_resume(tmp_path, "never", silent) is None
    save(tmp_path, 5)
    with pytest.raises(InputError, match=r"up to step 5; .*--resume auto.*another --name"):
        checkpoint.find_resume(tmp_path, "never", silent)


def test_checkpoints_that_cannot_be_listed_are_not_none(shut_folder: Path) -> None:
    """Law 14: a run does not start from scratch because its folder may not be read. Mutation: `glob` in `_steps`."""
    save(shut_folder, 5)
    with powerless(shut_folder), pytest.raises(PermissionError):
        checkpoint.find_resume(shut_folder, "auto", silent)


@pytest.mark.parametrize("spoil", [damage, remove_manifest, shutil.rmtree])
def test_a_path_is_taken_or_refused(tmp_path: Path, spoil: Any) -> None:
    """Law 14. `--resume PATH` to a damaged or missing checkpoint stops, though others are whole.

    Mutation: fall back to "auto" when the path is damaged.
    """
    for step in (5, 6):
        save(tmp_path, step)
    path = tmp_path / "step-00000005"
    assert checkpoint.find_resume(tmp_path, str(path), silent) == path
    spoil(path)
    with pytest.raises(InputError, match=r"step-00000005.*--resume auto"):
        checkpoint.find_resume(tmp_path, str(path), silent)


def test_going_back_abandons_what_came_later(tmp_path: Path) -> None:
    """Law 14. After a resume from step 5, neither "auto" nor `prune` may take step 9 for the newest; nothing is lost.

    Nor is it when the same steps are left again. Mutations: skip `rewind`; the newer branch then outlives the
    checkpoints of the run that goes on. In `rewind`, `next(free)` -> the first name; `count(2)` -> `count(3)`.
    """
    lines: list[str] = []
    folder = tmp_path / "checkpoints"
    for step in (2, 5, 7, 9):
        save(folder, step)
    damage(folder / "step-00000009")
    checkpoint.write_best(tmp_path, 7, 1.5)
    checkpoint.rewind(folder, 5, lines.append)
    assert kept(folder) == ["step-00000002", "step-00000005", "step-00000007.abandoned", "step-00000009.abandoned"]
    assert len(lines) == 2
    assert model_folder.best_step(tmp_path) is None
    save(folder, 6)
    checkpoint.prune(folder, 1, None)
    assert checkpoint.find_resume(folder, "auto", silent) == folder / "step-00000006"
    for branch in (1, 2):
        save(folder, 7, ema={"b": torch.tensor(branch)})
        checkpoint.rewind(folder, 6, lines.append)
    checkpoint.prune(folder, 1, None)
    left = [checkpoint.load_checkpoint(path).ema for path in sorted(folder.glob("step-00000007.abandoned*"))]
    assert [None if ema is None else int(ema["b"]) for ema in left] == [None, 1, 2]
    assert lines[-1].endswith("step-00000007 is now step-00000007.abandoned-3")


def test_rewind_keeps_an_earlier_best(tmp_path: Path) -> None:
    """Mutation: remove best.json always."""
    save(tmp_path / "checkpoints", 5)
    checkpoint.write_best(tmp_path, 5, 1.5)
    checkpoint.rewind(tmp_path / "checkpoints", 5, silent)
    assert model_folder.best_step(tmp_path) == 5


@pytest.mark.parametrize(("best", "expected"), [(None, [8, 9]), (3, [3, 8, 9]), (9, [8, 9]), (77, [8, 9])])
def test_the_last_and_the_best_are_kept(tmp_path: Path, best: int | None, expected: list[int]) -> None:
    """Retention, which also clears what killed saves left. Mutation: keep the oldest instead of the newest."""
    for step in (1, 3, 8, 9):
        save(tmp_path, step)
    (tmp_path / ".tmp-step-00000002").mkdir()
    checkpoint.prune(tmp_path, 2, best)
    assert kept(tmp_path) == [f"step-{step:08d}" for step in expected]


# ---- what may change


def changed(field: str, value: Any) -> dict[str, Any]:
    """CONFIG with one field, named with dots, changed."""
    config = json.loads(json.dumps(CONFIG))
    *sections, leaf = field.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[leaf] = value
    return config


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.d_model", 8), ("model.pool", [4]), ("data.segment", 32), ("audio.bits", 9), ("seed", 2)],
)
def test_what_fixes_the_run_may_not_change(field: str, value: Any) -> None:
    """The error names the field and both values and offers --init-from. Mutation: drop a name from FIXED_ON_RESUME."""
    with pytest.raises(InputError, match="--init-from") as error:
        checkpoint.compare_configs(CONFIG, changed(field, value))
    assert str(error.value).startswith(f"{field}={value}: the checkpoint")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.kernel", "cauchy"), ("data.workers", 0), ("train.steps", 99), ("model.pool", (2,)), ("name", "x")],
)
def test_what_does_not_fix_the_run_may_change(field: str, value: Any) -> None:
    """Steps, logging, kernel algorithm, workers; and (2,) is [2]. Mutation: empty FREE_ON_RESUME."""
    config = changed(field, None)
    *sections, leaf = field.split(".")
    (config[sections[0]] if sections else config)[leaf] = value
    checkpoint.compare_configs(CONFIG, config)


# ---- model folders


def export(folder: Path, seed: int = 0, **more: Any) -> Sashimi:
    """A model folder with random weights, and its model."""
    torch.manual_seed(seed)
    model = Sashimi(MODEL).eval()
    model_folder.save_model(
        folder, model.state_dict(), parsing.to_dict(MODEL), parsing.to_dict(AudioConfig()), {"from": "test"}, **more
    )
    return model


def test_a_saved_model_loads_and_runs(tmp_path: Path) -> None:
    """Same logits, eval mode. Mutation: skip `load_weights`."""
    folder = tmp_path / "out" / "model"
    model = export(folder)
    loaded = model_folder.load_model(folder)
    assert not loaded.training
    inputs = torch.randint(256, (1, 30))
    assert torch.equal(loaded(inputs), model(inputs))
    assert model_folder.load_model_folder(folder)[1]["source"] == {"from": "test"}
    shutil.rmtree(folder)
    export(folder, seed=1)
    assert not torch.equal(model_folder.load_model(folder)(inputs), model(inputs))


@pytest.mark.parametrize("format", legacy.FORMATS)
def test_an_imported_format_finds_its_class(tmp_path: Path, format: str) -> None:
    """And one that this version does not know is refused. Mutation: build Sashimi whatever the format."""
    weights = legacy.build(format, MODEL).state_dict()
    sections = parsing.to_dict(MODEL), parsing.to_dict(AudioConfig())
    model_folder.save_model(tmp_path / "model", weights, *sections, format=format)
    assert type(model_folder.load_model(tmp_path / "model")) is type(legacy.build(format, MODEL))
    model_folder.save_model(tmp_path / "other", weights, *sections, format="other")
    with pytest.raises(InputError, match="format='other'"):
        model_folder.load_model(tmp_path / "other")


def test_an_export_replaces_nothing(tmp_path: Path) -> None:
    """Neither foreign files nor a checkpoint, with the optimizer state in it, nor another model.

    Mutation: drop the check, or let a folder with a config.json be replaced.
    """
    (tmp_path / "notes.txt").write_text("mine")
    taken = [tmp_path, tmp_path / "notes.txt", save(tmp_path / "checkpoints", 5), tmp_path / "model"]
    export(taken[-1])
    for path in taken:
        with pytest.raises(InputError, match="exists and is not empty; delete it or give another one"):
            export(path, seed=1)
    assert not checkpoint.atomic.faults(taken[2])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")


def test_a_run_gives_its_best_checkpoint_else_the_newest_whole_one(tmp_path: Path) -> None:
    """Averaged weights go first, and no other checkpoint stands in for the best that is damaged.

    Mutations: ignore best.json, ema.safetensors or `found`.
    """
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(checkpoints, step)

    def loaded(path: Path) -> int:
        return int(model_folder.load_model_folder(path)[0]["b"])

    assert loaded(tmp_path) == 3
    checkpoint.write_best(tmp_path, 2, 1.5)
    assert loaded(tmp_path) == 2
    assert loaded(checkpoints / "step-00000001") == 1
    checkpoint.write_best(tmp_path, 9, 1.5)
    damage(checkpoints / "step-00000003")
    assert loaded(tmp_path) == 2
    save(checkpoints, 4, ema={"b": torch.tensor(44)})
    assert loaded(tmp_path) == 44
    checkpoint.write_best(tmp_path, 3, 1.5)
    with pytest.raises(InputError, match=r"step-00000003/model\.safetensors.*or give \S*/step-00000004, the newest"):
        loaded(tmp_path)


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def edit(folder: Path, section: str, **fields: Any) -> None:
    """Change config.json by hand, as users do: their folders have no manifest."""
    config = json.loads((folder / "config.json").read_text())
    config[section] = config[section] | fields if fields else None
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path) | changes
    safetensors.torch.save_file({name: value for name, value in weights.items() if value is not None}, path)


def put_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"embedding.weight": 1}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda f: (f / "config.json").unlink(), "no config.json and no checkpoints"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (break_json, "config.json: not JSON"),
        (lambda f: edit(f, "audio"), '"audio" is missing'),
        (lambda f: edit(f, "model", d_modle=4), "d_modle: no such field; did you mean d_model"),
        (lambda f: edit(f, "model", d_model="x"), "d_model=x: expected a whole number"),
        (lambda f: edit(f, "model", n_layers=0), "n_layers=0: must be"),
        (lambda f: edit(f, "model", glu=False), r"instead of .*, .*, .* and \d+ more"),
        (lambda f: rewrite(f, **{"norm.weight": None}), "norm.weight is missing"),
        (lambda f: rewrite(f, extra=torch.zeros(1)), "extra is unknown"),
        (lambda f: rewrite(f, **{"norm.bias": torch.zeros(5)}), r"norm.bias is \[5\] instead of \[4\]"),
        (damage, "not a whole safetensors file"),
        (put_a_pickle, "not a whole safetensors file"),
    ],
)
def test_a_bad_model_folder_says_what_is_wrong(tmp_path: Path, spoil: Any, message: str) -> None:
    """One line naming folder and fault; pickles are never opened. Mutation: drop that check."""
    folder = tmp_path / "model"
    export(folder)
    remove_manifest(folder)
    spoil(folder)
    with pytest.raises(InputError, match=message) as error:
        model_folder.load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_export_is_refused(tmp_path: Path) -> None:
    """Where there is a manifest it is believed. Mutation: drop the verification from `load_model_folder`."""
    export(tmp_path / "model")
    rewrite(tmp_path / "model", **{"norm.bias": torch.ones(4)})
    with pytest.raises(InputError, match="SHA-256"):
        model_folder.load_model(tmp_path / "model")


def test_weights_are_not_half_loaded() -> None:
    """A refused set of tensors leaves the model as it was. Mutation: load before comparing."""
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(InputError, match="bias is missing"):
        model_folder.load_weights(model, {"weight": torch.zeros(2, 2)}, "there")
    assert torch.equal(model.weight, before)
