"""Frozen dataclasses from command lines, YAML files and JSON, by jsonargparse. Knows nothing of what they configure.

Every field is an option (`--model.d_model 64`), its attribute docstring the help text, its annotation the check.
Whatever does not fit is an InputError of one line that names the file, the field and the value.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from sashimi.errors import InputError, one_line

T = TypeVar("T")

_MOST_NODES = 10_000  # values in a YAML file, with what its aliases stand for
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def parse(config_class: type[T], argv: Sequence[str], prog: str = "", description: str = "") -> T:
    """`config_class` from a command line: `--config FILE.yaml --section.field value ...`, later options winning.

    A field without a default is a positional argument. Dashes in names are underscores, several numbers after a name
    are a list, as is one where any number of them may be, and the bare name of a yes-or-no field is yes. `--help`
    prints every field and leaves by SystemExit(0). All other trouble is an InputError.
    """
    required = any(_is_required(field) for field in dataclasses.fields(config_class))  # type: ignore[arg-type]
    switches, tuples = _names(config_class, lambda kind: kind is bool), _names(config_class, _is_tuple)
    lists = _names(config_class, lambda kind: Ellipsis in get_args(kind))
    argv = _normalized(argv, switches, tuples, lists, positional=required)
    parser = _parser(config_class, prog, description)
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        for file in files.parse_known_args(argv)[0].config:
            _read(config_class, parser, Path(file))  # for its errors, which here still know their file
        namespace = parser.parse_args(argv)
    except (ArgumentError, argparse.ArgumentError) as error:
        raise InputError(_message(error, parser, config_class)) from None
    return _instantiate(config_class, parser, namespace)


def build(config_class: type[T], values: Mapping[str, Any], where: str) -> T:
    """`config_class` from an object read from JSON; `where`, say the file's path, goes into the errors."""
    parser = _parser(config_class)
    try:
        return _instantiate(config_class, parser, parser.parse_object(dict(values)))
    except (ArgumentError, InputError) as error:
        raise InputError(f"{where}: {_message(error, parser, config_class)}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values: nested dicts, and lists for tuples. `build` is the way back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _normalized(
    argv: Sequence[str], switches: set[str], tuples: set[str], lists: set[str], positional: bool
) -> list[str]:
    """["--some-field", "1", "2", "--switch"] -> ["--some_field", "[1,2]", "--switch=true"]

    `lists` are the tuples of any length, for which one number is a list too. Where there are no positional arguments,
    what follows a switch is its value, be it a wrong one.
    """

    def is_value(word: str) -> bool:
        return word.lower() in ("true", "false", "yes", "no") or (not positional and word != "" and word[:2] != "--")

    argv = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    words: list[str] = []
    for numbers, group in itertools.groupby(argv, lambda word: bool(re.fullmatch(r"-?[\d.]+(e-?\d+)?", word))):
        values = list(group)
        name = words[-1][2:] if words else ""
        is_list = numbers and (name in lists or (name in tuples and len(values) > 1))
        words += [f"[{','.join(values)}]"] if is_list else values
    return [
        f"{word}=true" if word[:2] == "--" and word[2:] in switches and not is_value(after) else word
        for word, after in itertools.zip_longest(words, words[1:], fillvalue="")
    ]


def _names(config_class: Any, wanted: Callable[[Any], bool], prefix: str = "") -> set[str]:
    """Dotted names of the fields of a wanted type."""
    names = set()
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            names |= _names(field.type, wanted, f"{prefix}{field.name}.")
        elif wanted(field.type):
            names.add(prefix + field.name)
    return names


def _is_tuple(kind: Any) -> bool:
    """Whether a type is a tuple, or may be one."""
    return tuple in (get_origin(kind), *map(get_origin, get_args(kind)))


def _parser(config_class: type, prog: str = "", description: str = "") -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog or None, description=description, exit_on_error=False, allow_abbrev=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(config_class, as_positional=True)
    return parser


def _file_parser(config_class: Any) -> ArgumentParser:
    """For a file alone: it need not give the positional arguments."""
    parser = _parser(config_class)
    parser.set_defaults({field.name: "" for field in dataclasses.fields(config_class) if _is_required(field)})
    return parser


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _read(config_class: type, parser: ArgumentParser, file: Path) -> Namespace:
    if not file.is_file():
        raise InputError(f"{file}: no such config file")
    try:
        _check_yaml(yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
        return _file_parser(config_class).parse_path(str(file))
    except (ArgumentError, InputError) as error:
        raise InputError(f"{file}: {_message(error, parser, config_class)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not a text file; give a YAML file such as launch/recipes/demo.yaml") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{file}: {line}not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # too deep, a number of 5000 digits
        raise InputError(f"{file}: not YAML that can be read: {' '.join(str(error).split())}") from None


def _check_yaml(root: yaml.Node | None) -> None:
    """InputError for keys that are there twice, of which YAML would take the last, and for aliases that explode."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = _MOST_NODES + 1  # until it is known: what contains itself has no end
        total = 1
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key.value, str) and key.value in seen:
                    raise InputError(f"line {key.start_mark.line + 1}: {key.value} is there twice; remove one")
                seen.add(str(key.value))
                total += size(value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(map(size, node.value))
        if total > _MOST_NODES:
            raise InputError(
                f"line {node.start_mark.line + 1}: more than {_MOST_NODES} values; write it without aliases"
            )
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root)


def _instantiate(config_class: type[T], parser: ArgumentParser, namespace: Namespace) -> T:
    _refuse_what_no_field_takes(config_class, namespace)
    values = parser.instantiate(namespace)
    return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})  # type: ignore[arg-type]


def _refuse_what_no_field_takes(config_class: Any, namespace: Namespace, prefix: str = "") -> None:
    """Null, which jsonargparse lets through for any type, and anything for a section; infinity, empty text, NUL."""
    for field in dataclasses.fields(config_class):
        name, value = prefix + field.name, namespace[field.name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, Namespace):
                raise InputError(f"{name}={_shown(value)}: a section; write its fields below it or leave it out")
            _refuse_what_no_field_takes(field.type, value, f"{name}.")
        elif value is None and field.default is not None:
            raise InputError(f"{name}: null is not a value for it; leave it out for the default")
        elif value == "" and field.default != "":
            raise InputError(f"{name}='': is empty; give a value, or leave it out for the default")
        elif isinstance(value, str) and "\0" in value:
            raise InputError(f"{name}={_shown(value)}: holds a NUL character")
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise InputError(f"{name}={value}: must be finite")


def _shown(value: Any) -> str:
    return one_line(str(value), 100)


def _expected(kind: Any, default: Any) -> str:
    """What a field takes, for people."""
    kinds = [one for one in get_args(kind) if one is not NoneType] if get_origin(kind) in (UnionType, Union) else []
    if kinds:
        return _expected(kinds[0], default) + (", or null" if NoneType in get_args(kind) else "")
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        return f"choose {', '.join(others)} or {last}"
    if get_origin(kind) is tuple:
        inner, *rest = get_args(kind)
        count = "" if Ellipsis in rest else f"{1 + len(rest)} "
        example = f" such as {list(default)}" if isinstance(default, tuple) else ""
        return f"expected a list of {count}{_WORDS[inner]}s{example}"
    word = _WORDS.get(kind, str(kind))
    return f"expected a {word}" if kind in (int, float) else f"expected {word}"


def _field(config_class: Any, name: str) -> dataclasses.Field[Any] | None:
    """The field of a dotted name."""
    first, _, rest = name.partition(".")
    found = next((field for field in dataclasses.fields(config_class) if field.name == first), None)
    if found is None or not rest:
        return found
    return _field(found.type, rest) if dataclasses.is_dataclass(found.type) else None


def _message(error: Exception, parser: ArgumentParser, config_class: type) -> str:
    """jsonargparse's message, put as "field=value: what is wrong" where it can be."""
    text = " ".join(str(error).split())
    found = re.fullmatch(r'Parser key "(\S+)": (?:Expected an? .*?\. Got|Does .* Errors: .*) value: ?(.*)', text)
    field = _field(config_class, found[1]) if found else None
    if found and field:
        return f"{found[1]}={_shown(found[2])}: {_expected(field.type, field.default)}"
    if found := re.match(r"Parser key \"(\S+)\": Unable to load config '(.*?)'", text):
        return f"{found[1]}={_shown(found[2])}: a section; give its fields, such as --{found[1]}.field value"
    if text.startswith("Unexpected config"):
        return "expected lines of the form `field: value`"
    if found := re.search(r"unrecognized arguments: ([^\s-]\S*)", text):
        return f"{_shown(found[1])}: was not expected; names with spaces need quotes"
    if found := re.search(
        r"unrecognized arguments: -*([\w.]+)|(?:Group '(.*)' does not accept option|Option) '(.*?)'", text
    ):
        name = found[1] or ".".join(filter(None, found.group(2, 3)))
        close = _closest(name, set(parser.get_defaults().keys()) - {name})
        return f"{name}: no such field; " + (f"did you mean {close[0]}?" if close else "--help lists them all")
    return one_line(text, 300)


def _closest(name: str, fields: set[str]) -> list[str]:
    """The field most like `name`, if any: before all others one whose last part is that of `name`, or its initials."""
    last = name.rpartition(".")[2]
    initials = "".join(word[:1] for word in last.split("_"))
    same = [field for field in fields if field.rpartition(".")[2] in (last, initials)]
    return difflib.get_close_matches(name, same, 1, cutoff=0) or difflib.get_close_matches(name, fields, 1)
