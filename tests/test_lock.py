"""One process at a time is at work in a folder, whatever ends it, and whatever its storage can do."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import pytest

from sashimi.errors import InputError
from sashimi.lock import lock


def unheard(text: str) -> None:
    pytest.fail(text)


def test_another_process_is_refused(tmp_path: Path) -> None:
    """And touches nothing. Mutations: no `lockf`; open the file with "w"."""
    (tmp_path / "x").write_text("kept")
    other = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", other, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(InputError, match=r"^it is taken$"):
            lock(tmp_path / "x", "it is taken", unheard)
        holder.stdin.close()
    lock(tmp_path / "x", "it is taken", unheard).close()
    assert (tmp_path / "x").read_text() == "kept"


def test_processes_that_were_forked_do_not_hold_it(tmp_path: Path) -> None:
    """A loader's worker that outlives a killed trainer does not keep the run from going on. Mutation: `fcntl.flock`."""
    fork = multiprocessing.get_context("fork")

    def work(pid: Synchronized) -> None:
        held = lock(tmp_path / "x", "it is taken", unheard)
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        pid.value = child.pid
        assert not held.closed
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork.Value("i")
    owner = fork.Process(target=work, args=(pid,))
    owner.start()
    owner.join()
    try:
        lock(tmp_path / "x", "it is taken", unheard).close()
    finally:
        os.kill(pid.value, signal.SIGKILL)


def test_one_that_its_owner_removes_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third process would get another one. Mutation: do not look at `st_nlink`."""
    monkeypatch.setattr(fcntl, "lockf", lambda file, how: (tmp_path / "x").unlink())
    with pytest.raises(InputError, match="it is taken"):
        lock(tmp_path / "x", "it is taken", unheard)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_storage_without_locks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """And work goes on. Mutation: no `except OSError`."""

    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    notes: list[str] = []
    lock(tmp_path / "x", "it is taken", notes.append).close()
    (note,) = notes
    assert note.startswith(f"{tmp_path}: cannot be locked ({os.strerror(number)}); see to it that no other")
