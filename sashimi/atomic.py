"""Files and folders that are whole or absent, whatever kills the process or fills the disk.

A folder is written under another name, every file flushed to the disk and `manifest.json` (sizes and SHA-256 of the
others) last, and only then gets its name. `faults` tells a whole folder from any other.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sashimi.errors import InputError

MANIFEST = "manifest.json"
Entry = dict[str, Any]
"""A file in a manifest: {"bytes": its size, "sha256": its checksum in hexadecimal}."""

UNFINISHED = ".tmp-"  # prefix of what is being written or deleted; nobody reads it


def to_json(value: Any) -> bytes:
    """`value` as readable JSON. NaN and infinity are not JSON, so they are a ValueError."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError if it is missing, malformed or not an object."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; restore the file or use another folder") from None
    return from_json(content, str(path))


def from_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `content` is; InputError that begins with `where` if it is malformed or not an object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, numbers too long
        raise InputError(f"{where}: not JSON ({error}); restore the file or use another folder") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: must hold a JSON object, not {type(value).__name__}")
    return value


def write_file(path: Path, content: bytes) -> None:
    """Replace one file: readers see the old content or the new, also after a crash. OSError leaves the old one.

    One process at a time may write one file.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        _write_flushed(unfinished, content)
        os.replace(unfinished, path)
        _flush_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace one JSON file, as `write_file` does."""
    write_file(path, to_json(value))


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]], parts: Mapping[str, Entry] | None = None) -> None:
    """Make or replace `folder` with these files and their manifest. An OSError leaves what was there before.

    One process at a time may write one folder; what a killed one left of it is cleared away. Where others write files
    of it, it calls `begin_folder`, they `write_part`, and then it calls this with what they got, by name, as `parts`.
    """
    if parts is None:
        begin_folder(folder)
    unfinished, entries = _unfinished(folder), dict(parts or {})
    try:
        for name, entry in entries.items():
            if (unfinished / name).stat().st_size != entry["bytes"]:
                raise OSError(f"{unfinished / name}: not as another process wrote it; use storage that all nodes share")
        for name, content in files:
            entries[name] = _write_entry(unfinished / name, content)
        _write_flushed(unfinished / MANIFEST, to_json({"files": entries}))
        _flush_folder(unfinished)
        replaced = folder.rename(_removed(folder)) if folder.exists() else None
        os.rename(unfinished, folder)
        _flush_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if replaced is not None:
        shutil.rmtree(replaced)


def begin_folder(folder: Path) -> None:
    """Make the empty place where `folder` is written until it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in (_unfinished(folder), _removed(folder)):
        if stale.exists():
            shutil.rmtree(stale)
    _unfinished(folder).mkdir()


def write_part(folder: Path, name: str, content: bytes) -> Entry:
    """Write one file of a folder that another process has begun and will finish, and return its manifest's entry."""
    return _write_entry(_unfinished(folder) / name, content)


def abandon_folder(folder: Path) -> None:
    """Delete what `begin_folder` and `write_part` have made."""
    shutil.rmtree(_unfinished(folder), ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; a kill half-way does not leave a damaged one of that name."""
    shutil.rmtree(folder.rename(_removed(folder)))


def clear_unfinished(parent: Path, name: str) -> None:
    """Delete what killed writes and removals of folders left in `parent`; `name` is a glob for the folders' names."""
    for stale in parent.glob(UNFINISHED + name):
        shutil.rmtree(stale)


def faults(folder: Path) -> list[str]:
    """What keeps `folder` from being what `write_folder` wrote: one line a fault, each naming its file; [] if whole."""
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    try:
        entries = read_json(folder / MANIFEST)["files"].items()
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries}
        if not all(name and Path(name).name == name and name.isprintable() for name in expected):
            raise KeyError  # or it could make us read anywhere
    except InputError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError):
        return [f"{folder / MANIFEST}: not a manifest"]
    found = [] if expected else [f"{folder / MANIFEST}: names no files"]
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != size:
            found.append(f"{path}: {path.stat().st_size} bytes instead of {size}")
        elif _sha256(path) != digest:
            found.append(f"{path}: SHA-256 differs from the manifest")
    return found


def _unfinished(folder: Path) -> Path:
    return folder.with_name(UNFINISHED + folder.name)


def _removed(folder: Path) -> Path:
    return folder.with_name(f"{UNFINISHED}{folder.name}-removed")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_entry(path: Path, content: bytes) -> Entry:
    _write_flushed(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_flushed(path: Path, content: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # writing does not say where
        raise


def _flush_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a rename alone may be forgotten by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
