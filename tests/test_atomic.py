"""Files and folders are whole or absent: after kills, full disks and damage."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import disk_of

from sashimi import atomic
from sashimi.errors import InputError

FILES = [("a.bin", b"a" * 100_000), ("b.json", b"{}")]


def write_for_ever(parent: Path) -> None:
    """A folder is made, replaced and removed, and a file replaced, again and again."""
    folder = parent / "step-1"
    for i in range(10**9):
        for content in (b"a" * 300_000, b"b" * 300_000):
            atomic.write_folder(folder, [("a.bin", content), ("b.bin", content)])
        atomic.write_json(parent / "file.json", {"i": i, "padding": "x" * 10_000})
        atomic.remove_folder(folder)


def test_a_kill_at_any_moment_leaves_whole_folders_only(tmp_path: Path) -> None:
    """Law 14. SIGKILL at many moments of writing, replacing and removing: what has a name is whole.

    Mutation: write into `folder` itself instead of the unfinished one.
    """
    fork = multiprocessing.get_context("fork")
    seen = 0
    for trial in range(40):
        writer = fork.Process(target=write_for_ever, args=(tmp_path,))
        writer.start()
        time.sleep(0.01 + 0.003 * trial)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        if (tmp_path / "step-1").exists():
            assert atomic.faults(tmp_path / "step-1") == []
            seen += 1
        if (tmp_path / "file.json").exists():
            assert "i" in atomic.read_json(tmp_path / "file.json")
    assert seen > 5


@pytest.mark.parametrize("before", ["nothing", "whole", "damaged"])
@pytest.mark.parametrize("size", [0, 60_000, 100_000])
def test_full_disk_leaves_what_was_there(tmp_path: Path, before: str, size: int) -> None:
    """Law 14. No room for the first file, half of it, or (100,001 bytes) the second: OSError, nothing half.

    Mutation: drop the `finally` that removes the unfinished folder.
    """
    folder = tmp_path / "step-1"
    if before != "nothing":
        atomic.write_folder(folder, [("old", b"1")])
    if before == "damaged":
        (folder / "old").unlink()
    with disk_of(size), pytest.raises(OSError, match="File too large"):
        atomic.write_folder(folder, [*FILES, ("c.bin", b"c" * 100_001)])
    assert [path.name for path in tmp_path.iterdir()] == ([] if before == "nothing" else ["step-1"])
    assert (folder / "old").exists() == (before == "whole")
    atomic.write_folder(folder, FILES)
    assert atomic.faults(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "b.json", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_parts_that_others_write(tmp_path: Path) -> None:
    """They are in the manifest, and what a killed save left is not. Mutation: `entries = {}` in `write_folder`."""
    folder = tmp_path / "step-1"
    atomic.begin_folder(folder)
    atomic.write_part(folder, "stale", b"1")
    atomic.begin_folder(folder)
    parts = {name: atomic.write_part(folder, name, name.encode() * 100) for name in ("0.pt", "1.pt")}
    assert not folder.exists()
    atomic.write_folder(folder, FILES, parts)
    assert atomic.faults(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == ["0.pt", "1.pt", "a.bin", "b.json", "manifest.json"]
    (folder / "1.pt").write_bytes(b"1.pt" * 99 + b"!.pt")
    assert atomic.faults(folder) == [f"{folder / '1.pt'}: SHA-256 differs from the manifest"]


@pytest.mark.parametrize("lost", [True, False])
def test_a_part_that_is_not_there(tmp_path: Path, lost: bool) -> None:
    """Law 14. Written on another machine's own disk, or not by all: no folder of it; the old one stands.

    Mutation: drop the loop over `parts` in `write_folder`.
    """
    folder = tmp_path / "step-1"
    atomic.write_folder(folder, FILES)
    atomic.begin_folder(folder)
    part = atomic.write_part(folder, "0.pt", b"1")
    if lost:
        (tmp_path / ".tmp-step-1/0.pt").unlink()
    with pytest.raises(OSError, match=r"0\.pt"):
        atomic.write_folder(folder, FILES, {"0.pt": part if lost else part | {"bytes": 2}})
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert atomic.faults(folder) == []


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Mutation: write to `path` itself in `write_file`."""
    atomic.write_json(tmp_path / "x.json", {"old": 1})
    with disk_of(10), pytest.raises(OSError, match="File too large"):
        atomic.write_json(tmp_path / "x.json", {"new": "x" * 100})
    assert atomic.read_json(tmp_path / "x.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.bin", Path.unlink, "a.bin: missing"),
        ("a.bin", truncate, "a.bin: 99999 bytes instead of 100000"),
        ("a.bin", flip_a_bit, "a.bin: SHA-256"),
        ("b.json", flip_a_bit, "b.json: SHA-256"),
        ("manifest.json", Path.unlink, "manifest.json: no such file"),
        ("manifest.json", lambda path: path.write_text("[]"), "must hold a JSON object"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json: not a manifest"),
        ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:-5]), "manifest.json: not JSON"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "manifest.json: not JSON"),
    ],
)
def test_every_damage_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    """Law 14. A missing, short or altered file, or manifest, is a fault of one line that names it.

    Mutation: compare sizes only.
    """
    folder = tmp_path / "step-1"
    atomic.write_folder(folder, FILES)
    assert atomic.faults(folder) == []
    damage(folder / name)
    (fault,) = atomic.faults(folder)
    assert message in fault
    assert "\n" not in fault


def test_no_folder_is_a_fault(tmp_path: Path) -> None:
    """Mutation: return [] for a folder that is not there."""
    assert atomic.faults(tmp_path / "nothing") == [f"{tmp_path}/nothing: no such folder"]


def test_json_that_is_none_is_refused(tmp_path: Path) -> None:
    """Reading says which file and why; NaN, which other readers choke on, is never written.

    Mutation: drop allow_nan=False.
    """
    with pytest.raises(InputError, match=r"x\.json: no such file"):
        atomic.read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
