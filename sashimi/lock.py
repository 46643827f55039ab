"""A lock by which one process at a time is at work in a folder."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from sashimi.errors import InputError


def lock(file: Path, refusal: str, note: Callable[[str], None]) -> TextIO:
    """Opens and locks a file, until it is closed or this process ends. InputError(refusal) if another one has it.

    Not by flock, whose locks a process shares with those that it forks, and leaves to them when it is killed. Where the
    storage has no locks, as that of some clusters, one line is noted.
    """
    opened = file.open("a")
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = os.fstat(opened.fileno()).st_nlink == 0  # whoever had it has just removed it
    except (BlockingIOError, PermissionError):
        taken = True
    except OSError as error:
        taken = False
        note(f"{file.parent}: cannot be locked ({error.strerror}); see to it that no other process works in it")
    if taken:
        opened.close()
        raise InputError(refusal)
    return opened
