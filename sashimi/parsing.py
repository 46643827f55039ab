"""Frozen dataclasses from command lines, YAML files and JSON, by jsonargparse. Knows nothing of what they configure.

Every field is an option (`--model.d_model 64`), its attribute docstring the help text, its annotation the check.
Whatever does not fit is an InputError of one line that names the file, the field and the value.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from sashimi.errors import InputError

T = TypeVar("T")


def parse(config_class: type[T], argv: Sequence[str], prog: str = "", description: str = "") -> T:
    """`config_class` from a command line: `--config FILE.yaml --section.field value ...`, later options winning.

    A field without a default is a positional argument. Dashes in names are underscores, several numbers after a name
    are a list, and the bare name of a yes-or-no field is yes. `--help` prints every field and leaves by SystemExit(0).
    All other trouble is an InputError.
    """
    argv = _normalized(argv, _switches(config_class))
    parser = _parser(config_class, prog, description)
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        for file in files.parse_known_args(argv)[0].config:
            _read(parser, Path(file))  # for its errors, which here still know their file
        namespace = parser.parse_args(argv)
    except (ArgumentError, argparse.ArgumentError) as error:
        raise InputError(_one_line(error, parser)) from None
    return _instantiate(config_class, parser, namespace)


def build(config_class: type[T], values: Mapping[str, Any], where: str) -> T:
    """`config_class` from an object read from JSON; `where`, say the file's path, goes into the errors."""
    parser = _parser(config_class)
    try:
        return _instantiate(config_class, parser, parser.parse_object(dict(values)))
    except (ArgumentError, InputError) as error:
        raise InputError(f"{where}: {_one_line(error, parser)}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values: nested dicts, and lists for tuples. `build` is the way back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _normalized(argv: Sequence[str], switches: set[str]) -> list[str]:
    """["--some-field", "1", "2", "--switch"] -> ["--some_field", "[1,2]", "--switch=true"]"""
    words: list[str] = []
    for numbers, group in itertools.groupby(argv, lambda word: bool(re.fullmatch(r"-?[\d.]+(e-?\d+)?", word))):
        values = list(group)
        words += [f"[{','.join(values)}]"] if numbers and len(values) > 1 else values
    words = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
    return [
        f"{word}=true" if word[:2] == "--" and word[2:] in switches and after.lower() not in ("true", "false") else word
        for word, after in itertools.zip_longest(words, words[1:], fillvalue="")
    ]


def _switches(config_class: Any, prefix: str = "") -> set[str]:
    """Names of the yes-or-no fields: on the command line the name alone means yes."""
    names = set()
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            names |= _switches(field.type, f"{prefix}{field.name}.")
        elif field.type is bool:
            names.add(prefix + field.name)
    return names


def _parser(config_class: type, prog: str = "", description: str = "") -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog or None, description=description, exit_on_error=False, allow_abbrev=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(config_class, as_positional=True)
    return parser


def _read(parser: ArgumentParser, file: Path) -> Namespace:
    if not file.is_file():
        raise InputError(f"{file}: no such config file")
    try:
        return parser.parse_path(str(file))
    except ArgumentError as error:
        raise InputError(f"{file}: {_one_line(error, parser)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not a text file; give a YAML file such as launch/recipes/demo.yaml") from None


def _instantiate(config_class: type[T], parser: ArgumentParser, namespace: Namespace) -> T:
    _refuse_nulls(config_class, namespace)
    values = parser.instantiate(namespace)
    return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})  # type: ignore[arg-type]


def _refuse_nulls(config_class: Any, namespace: Namespace, prefix: str = "") -> None:
    """jsonargparse lets null through for any type, and anything for a section."""
    for field in dataclasses.fields(config_class):
        name, value = prefix + field.name, namespace[field.name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, Namespace):
                raise InputError(f"{name}={value}: a section; write its fields below it or leave it out")
            _refuse_nulls(field.type, value, f"{name}.")
        elif value is None and field.default is not None:
            raise InputError(f"{name}: null is not a value for it; leave it out for the default")


def _one_line(error: Exception, parser: ArgumentParser) -> str:
    """jsonargparse's message, put as "field=value: what is wrong" where it can be."""
    text = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", " ".join(str(error).split()))
    if found := re.fullmatch(r'Parser key "(\S+)": Expected an? (.*)\. Got value: (.*)', text):
        expected = "a list such as [4, 4]" if found[2] == "tuple" else found[2]
        return f"{found[1]}={found[3]}: expected {expected}"
    if found := re.fullmatch(r'Parser key "(\S+)": Does .* Subtypes: \[(.*)\] Errors: .* value: (.*)', text):
        return f"{found[1]}={found[3]}: expected {found[2].replace(', NoneType', ' or null')}"
    if text.startswith("Unexpected config"):
        return "expected lines of the form `field: value`"
    if found := re.search(
        r"unrecognized arguments: -*([\w.]+)|(?:Group '(.*)' does not accept option|Option) '(.*?)'", text
    ):
        name = found[1] or ".".join(filter(None, found.group(2, 3)))
        close = difflib.get_close_matches(name, set(parser.get_defaults().keys()) - {name}, 1)
        return f"{name}: no such field; " + (f"did you mean {close[0]}?" if close else "--help lists them all")
    return text
