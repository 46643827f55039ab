"""Figures beside those of a recorded run: old, new, new/old."""

import json
from pathlib import Path
from typing import Any

from sashimi.errors import InputError

PLACE = ("device", "threads", "torch")  # beside the settings: figures that differ in one of these are not alike


def read_record(file: str, part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The last line of this part that --json wrote into the file, of these settings if there is one. InputError."""
    remedy = f"give a file that `python tools/bench.py {part} --json` has written"
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"compare={file}: {error.strerror}; {remedy}") from None
    except UnicodeDecodeError:
        raise InputError(f"compare={file}: is not a text file; {remedy}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"compare={file}: line {number} is not JSON; {remedy}") from None
        if not isinstance(record, dict):
            raise InputError(f"compare={file}: line {number} is not a record of figures; {remedy}")
        records.append(record)
    records = [record for record in records if record.get("part") == part]
    if not records:
        raise InputError(f"compare={file}: has no line of part {part}; {remedy}")
    alike = [record for record in records if record.get("settings") == settings]
    return (alike or records)[-1]


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Old, new and new/old of each figure that both have."""
    both = [name for name in new if _is_figure(name, new[name]) and _is_figure(name, old.get(name)) and old[name]]
    return {name: (old[name], new[name], new[name] / old[name]) for name in both}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else than the code may have changed the figures, a line each."""
    was, now = _place(old), _place(new)
    return [
        f"{name} was {json.dumps(was.get(name))}, is {json.dumps(value)}: these figures do not compare"
        for name, value in now.items()
        if was.get(name) != value
    ]


def _place(record: dict[str, Any]) -> dict[str, Any]:
    settings = record.get("settings")
    return (settings if isinstance(settings, dict) else {}) | {name: record.get(name) for name in PLACE}


def _is_figure(name: str, value: Any) -> bool:
    return name not in PLACE and isinstance(value, int | float) and not isinstance(value, bool)
