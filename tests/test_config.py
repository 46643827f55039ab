"""RunConfig: documented, checked across its parts, and enough to run again."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sashimi.config import RunConfig, parse_run_config, save_config
from sashimi.errors import InputError

DIFFERENT = ["--name=other", "--seed=3", "--audio.bits=10", "--model.levels=1024", "--model.pool=[2,4]"]
DIFFERENT += ["--optim.betas=[0.9,0.95]", "--optim.lr=1e-5", "--data.tail=drop", "--data.crop=true", "--init-from=x"]
DIFFERENT += ["--train.steps=7", "--track.log_every=1", "--resume=never", "--runs=elsewhere"]

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.yaml"))


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        found |= leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def test_the_saved_config_is_the_same_run(tmp_path: Path) -> None:
    """Every field comes back, by itself and as the only argument. Mutation: save only what differs from defaults."""
    config = parse_run_config(DIFFERENT)
    assert all(leaves(config)[word[2:].split("=")[0].replace("-", "_")] is not None for word in DIFFERENT)
    file = tmp_path / "config.yaml"
    save_config(config, file)
    assert parse_run_config(["--config", str(file)]) == config
    assert parse_run_config(["--config", str(file)]) == config
    save_config(RunConfig(), file)
    assert all(f"{name.rpartition('.')[2]}:" in file.read_text() for name in leaves(config))


@pytest.mark.parametrize(
    "name", ["1e-3", "1e5", "5.", "1_000", "0x1f", "1:30", "true", "null", "3", "~", ".5e3", "nan"]
)
def test_names_that_look_like_something_else_come_back(tmp_path: Path, name: str) -> None:
    """As of runs that try several learning rates. Mutation: `style` for all of them in `_Dumper`."""
    config = RunConfig(name=name, runs=str(tmp_path / name))
    save_config(config, tmp_path / "config.yaml")
    assert parse_run_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option has a sentence, a type and a default. Mutation: delete any field's docstring."""
    with pytest.raises(SystemExit):
        parse_run_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = {entry.split()[0]: entry for entry in re.split(r" --(?=[a-z])", text[text.index("A run.") :])}
    for name in leaves(RunConfig()):
        documented = re.fullmatch(r"\S+ \S+ (.*\w.*\.)? ?\(type: .*, default: .*\).*", options[name])
        assert documented, options[name]
        assert len(documented[1].split()) > 1, options[name]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--name=a/b", "name='a/b': must be a plain folder name"),
        ("--name=..", "name='..': must be a plain"),
        ("--name=", "name='': is empty"),
        ("--seed=-1", "seed=-1: must be from 0 to 2"),
        ("--seed=9223372036854775808", "seed=9223372036854775808: must be from 0 to 2"),
        ("--audio.bits=9", "model.levels=256: audio.bits=9 needs 512"),
        ("--data.segment=1001", "data.segment=1001: must be a multiple of 16, .* the next one is 1008"),
        ("--model.pool=[3,5]", r"data.segment=16000: must be a multiple of 15, .*\[3, 5\]; the next one is 16005"),
        ("--model.d_modle=3", "model.d_modle: no such field; did you mean model.d_model?"),
        ("--optim.lr=0", "optim.lr=0.0: must be above 0"),
        ("--train.steps=0", "train.steps=0"),
        ("--track.log_every=0", "track.log_every=0"),
        ("--track.audio_seconds=0", "track.audio_seconds=0.0"),
        ("--track.audio_seconds=1e-5", "track.audio_seconds=1e-05: is less than one sample at 16000 Hz"),
        ("--track.audio_every=-1", "track.audio_every=-1"),
        ("--data.tail=cut", "data.tail=cut"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(option: str, message: str) -> None:
    """Mutation: drop that check."""
    with pytest.raises(InputError, match=f"^{message}") as error:
        parse_run_config([option])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--lr", "optim.lr"),
        ("--optim.learning_rate", "optim.lr"),
        ("--model.steps", "train.steps"),
        ("--optim.mni_lr", "optim.min_lr"),
    ],
)
def test_a_wrong_name_is_told_the_right_one(name: str, meant: str) -> None:
    """Its last part counts for more than its spelling as a whole. Mutations: drop `last`, `initials` or `cutoff=0`."""
    with pytest.raises(InputError, match=f"did you mean {meant}[?]$"):
        parse_run_config([name, "0.1"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_config(recipe: Path) -> None:
    """And names its run after itself, so that two recipes never share a folder. Mutation: misspell a field in one."""
    assert parse_run_config(["--config", str(recipe)]).name == recipe.stem


def test_the_run_folder() -> None:
    """Mutation: leave out `runs`."""
    assert parse_run_config(["--runs=a", "--name=b"]).folder == Path("a/b")


def test_a_moved_run_is_not_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config names the folder where it was, unless that is the same one or what comes later names another.

    Mutations: drop the check; in `_naming_file`, drop `reversed`, the return of None, or the look into files, or look
    with a `SafeLoader`.
    """
    monkeypatch.chdir(tmp_path)
    new, there = Path("runs/new"), ["--config", "runs/new/config.yaml"]
    (new / "checkpoints").mkdir(parents=True)
    save_config(RunConfig(name="old"), new / "config.yaml")
    Path("steps.yaml").write_text("train: {steps: 7}")
    Path("named.yaml").write_text("name: 2024-13-45")
    for argv in (there, ["--name=own", *there], [*there, "--config=steps.yaml"]):
        with pytest.raises(InputError) as error:
            parse_run_config(argv)
        assert str(error.value) == (
            "runs/new/config.yaml: is of the run in runs/new, but names runs/old; "
            "to go on with that run, add --runs runs --name new, to start another one, a --name"
        )
    for argv in (["--name=old"], ["--name", "own"], ["--runs=x"], ["--config", "named.yaml"]):
        assert parse_run_config([*there, *argv]).folder != new
    assert parse_run_config([*there, "--runs", "runs", "--name", "new"]).folder == new
    Path("runs/old").symlink_to("new")
    assert parse_run_config(there).folder.samefile(new)
    Path("runs/old").unlink()
    (new / "checkpoints").rmdir()
    assert parse_run_config(there).folder == Path("runs/old")
