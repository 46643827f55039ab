"""Configs from command lines, YAML and JSON: what fits is taken, what does not is one line that names it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sashimi import parsing
from sashimi.errors import InputError


@dataclass(frozen=True)
class Part:
    """A section."""

    width: int = 64
    """Width in channels."""
    pool: tuple[int, ...] = (4, 4)
    """Pooling factors."""
    rate: float = 0.004
    """Rate in Hz."""
    mode: Literal["fast", "slow"] = "fast"
    """Mode."""
    source: str | None = None
    """A path."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"part.width={self.width}: must be at least 1")


@dataclass(frozen=True)
class Whole:
    """All of it."""

    name: str = "run"
    """Name of the run."""
    init_from: str | None = None
    """Another path."""
    between: tuple[float, float] | None = None
    """A range."""
    part: Part = field(default_factory=Part)
    """A part."""


@dataclass(frozen=True)
class Command:
    """One of the commands that take a folder."""

    folder: str
    """The folder."""
    split: str = "test"
    """The split."""
    dry_run: bool = False
    """Only say what would be done."""


def parse(*argv: str) -> Whole:
    return parsing.parse(Whole, argv, "prog")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Whole()),
        (["--part.pool", "[4,2]", "--part.rate=1e-3"], Whole(part=Part(pool=(4, 2), rate=0.001))),
        (["--part.pool=[]", "--part.source", "null"], Whole(part=Part(pool=()))),
        (["--init-from", "a-b/c", "--name=x-y"], Whole(init_from="a-b/c", name="x-y")),
        (["--name", "3"], Whole(name="3")),
        (["--part.pool", "2", "3", "5", "--part.rate", "-0.5"], Whole(part=Part(pool=(2, 3, 5), rate=-0.5))),
        (["--between", "0.4", ".95"], Whole(between=(0.4, 0.95))),
        (["--part.pool", "4", "--part.width", "8"], Whole(part=Part(width=8, pool=(4,)))),
    ],
)
def test_command_lines(argv: list[str], expected: Whole) -> None:
    """Lists, floats, null, strings that look like numbers; dashes in names are underscores, in values not.

    Mutations: in `_normalized`, drop the first line, `len(values) > 1` or `in lists`, or replace every dash; in
    `_is_tuple`, no `get_args`.
    """
    assert parse(*argv) == expected


def test_a_file_need_not_give_what_is_positional(tmp_path: Path) -> None:
    """But the command line must. Mutation: `_parser` for `_file_parser` in `_read`; or defaults in `_parser`."""
    file = tmp_path / "command.yaml"
    file.write_text("split: train")
    assert parsing.parse(Command, ["shards/x", "--config", str(file)]) == Command("shards/x", "train")
    with pytest.raises(InputError, match="folder"):
        parsing.parse(Command, ["--config", str(file)])


def test_a_field_without_a_default_is_positional() -> None:
    r"""Mutations: as_positional=False; `[\w.]+` in place of `[^\s-]\S*`; in `_normalized`, no `in tuples`."""
    assert parsing.parse(Command, ["runs/x", "--split=valid"]) == Command("runs/x", "valid")
    assert parsing.parse(Command, ["--split", "valid", "runs/x"]) == Command("runs/x", "valid")
    with pytest.raises(InputError, match="required: folder"):
        parsing.parse(Command, ["--split=valid"])
    with pytest.raises(InputError, match=r"^to/stray: was not expected; names with spaces need quotes$"):
        parsing.parse(Command, ["runs/x", "to/stray", "--split=valid"])
    with pytest.raises(InputError, match=r"^8: was not expected"):
        parsing.parse(Command, ["runs/x", "--split", "7", "8"])


def test_the_name_of_a_switch_alone_is_yes() -> None:
    """Mutation: an empty set in place of `switches`."""
    assert parsing.parse(Command, ["runs/x", "--dry-run"]) == Command("runs/x", dry_run=True)
    assert parsing.parse(Command, ["--dry-run", "runs/x"]) == Command("runs/x", dry_run=True)
    assert parsing.parse(Command, ["runs/x", "--dry-run", "false"]) == Command("runs/x")


def test_later_options_win(tmp_path: Path) -> None:
    """A file gives what the command line after it leaves open. Mutation: parse the files last."""
    file = tmp_path / "x.yaml"
    file.write_text("name: file\npart:\n  pool: [2, 2]\n  rate: 1e-3\n")
    assert parse("--config", str(file)) == Whole(name="file", part=Part(pool=(2, 2), rate=0.001))
    assert parse("--config", str(file), "--part.pool=[8]").part == Part(pool=(8,), rate=0.001)
    assert parse("--name", "before", f"--config={file}").name == "file"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--part.widht 3", "part.widht: no such field; did you mean part.width?"),
        ("--part.wid 3", "part.wid: no such field; did you mean part.width?"),
        ("--xyz=3", "xyz: no such field; --help lists them all"),
        ("stray", "stray: was not expected; names with spaces need quotes"),
        ("--part.width 1.5", "part.width=1.5: expected a whole number"),
        ("--part.rate nan", "part.rate=nan: expected a number"),
        ("--part.pool four", "part.pool=four: expected a list of whole numbers such as [4, 4]"),
        ("--between 3", "between=3: expected a list of 2 numbers, or null"),
        ("--part.mode quick", "part.mode=quick: choose fast or slow"),
        ("--part.width 0", "part.width=0: must be at least 1"),
        ("--part.width", "argument --part.width: expected one argument"),
        ("--config nothing.yaml", "nothing.yaml: no such config file"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: str, message: str) -> None:
    """No usage wall, no traceback, no abbreviation. Mutation: allow_abbrev=True, or exit_on_error=True."""
    with pytest.raises(InputError) as error:
        parse(*argv.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("part:\n  pol: [2]\n", "part.pol: no such field; did you mean part.pool?"),
        ("nmae: x\n", "nmae: no such field; did you mean name?"),
        ("part:\n  width: x\n", "part.width=x: expected a whole number"),
        ("part:\n  width: 0\n", "part.width=0: must be at least 1"),
        ("part:\n  width: null\n", "part.width: null is not a value for it; leave it out for the default"),
        ("part: 3\n", "part=3: a section; write its fields below it or leave it out"),
        ("name: x\npart:\n", "part=None: a section; write its fields below it or leave it out"),
        ("- 1\n", "expected lines of the form `field: value`"),
        ("", "expected lines of the form `field: value`"),
        ("part: [\n", "line 2: not YAML: "),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    """A value out of bounds may be the command line's as well: it is named alone.

    Mutation: drop `{file}: ` from the error, or `_refuse_nulls`.
    """
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse("--config", str(file))
    wherever = re.search("must be|null|section", message)
    assert str(error.value).startswith(message if wherever else f"{file}: {message}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    """Mutation: drop `except UnicodeDecodeError`."""
    file = tmp_path / "x.yaml"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"x\.yaml: is not a text file"):
        parse("--config", str(file))


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Attribute docstrings, types and defaults. Mutation: drop set_parsing_settings."""
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Width in channels. (type: int, default: 64)" in text
    assert "Pooling factors. (type: tuple[int, ...], default: (4, 4))" in text
    assert "Name of the run. (type: str, default: run)" in text


def test_json_and_back() -> None:
    """`build` undoes `to_dict`; absent fields have their defaults. Mutation: leave tuples in `to_dict`."""
    config = Whole(name="x", part=Part(pool=(2, 3, 4), source="s"))
    values = parsing.to_dict(config)
    assert values == json.loads(json.dumps(values))
    assert parsing.build(Whole, values, "there") == config
    assert parsing.build(Part, {}, "there") == Part()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "widht: no such field; did you mean width?"),
        ({"width": "x"}, "width=x: expected a whole number"),
        ({"pool": 4}, "pool=4: expected a list of whole numbers such as [4, 4]"),
        ({"width": None}, "width: null is not a value for it; leave it out for the default"),
        ({"width": 0}, "part.width=0: must be at least 1"),
    ],
)
def test_a_wrong_object_names_where_it_is_from(values: dict[str, Any], message: str) -> None:
    """Mutation: drop `{where}: ` from the error."""
    with pytest.raises(InputError) as error:
        parsing.build(Part, values, "model/config.json")
    assert str(error.value) == f"model/config.json: {message}"
