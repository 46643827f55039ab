"""A C++ source of this folder, compiled for this CPU at its first use, and tensors as these take them."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from sashimi.atomic import write_file
from sashimi.errors import Unavailable

# Sums may be taken in any order, so that they can be vectors; NaN and infinity stay what they are.
_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math".split()
_FLAGS += ["-shared", "-fPIC"]


@functools.cache
def library(name: str, *more_flags: str) -> ctypes.CDLL:
    """NAME.cpp for this CPU, compiled at its first use and kept in ~/.cache/sashimi. Raises Unavailable."""
    source, flags = Path(__file__).with_name(f"{name}.cpp"), [*_FLAGS, *more_flags]
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler")
    try:
        about = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
        key = hashlib.sha256(b"\0".join((*texts, " ".join(flags).encode(), about, _cpu()))).hexdigest()
        target = Path.home() / ".cache" / "sashimi" / f"{name}-{key[:16]}.so"
        with suppress(OSError):
            return ctypes.CDLL(str(target))
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / target.name
            command = [compiler, *flags, str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, text=True)
            loaded = ctypes.CDLL(str(made))
            with suppress(OSError):  # where there is no room for it, it is compiled each time
                target.parent.mkdir(parents=True, exist_ok=True)
                own = target.with_name(f"{uuid.uuid4().hex}.so")  # other processes may compile it too
                write_file(own, made.read_bytes())
                own.replace(target)
        return loaded
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} failed: {(error.stderr or 'it gave no reason').splitlines()[0]}") from error
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"it cannot be compiled or loaded: {error}") from error


@functools.cache
def library_or_none(name: str, what: str, *more_flags: str) -> ctypes.CDLL | None:
    """`library`; None where there is none, and PyTorch does `what` instead, which is said once."""
    try:
        return library(name, *more_flags)
    except Unavailable as reason:
        warnings.warn(f"{what} run in PyTorch, compiled code is not to be had: {reason}", stacklevel=3)
        return None


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and from where a line of the cache begins: as torch allocates, but not where it cuts out a part."""
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


def _cpu() -> bytes:
    """What tells CPUs apart, where the home folder is shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = set(info.read_bytes().splitlines()) if info.exists() else set()
    return b"\n".join(sorted(line for line in lines if line.startswith((b"flags", b"model name", b"Features"))))
