"""generate.cpp, compiled for this CPU at its first use."""

import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from sashimi.atomic import write_file
from sashimi.errors import Unavailable

_SOURCE = Path(__file__).with_name("generate.cpp")
# Sums may be taken in any order, so that they can be vectors; NaN and infinity stay what they are.
_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math".split()


class Tables(ctypes.Structure):
    _fields_ = (("erf", ctypes.c_float * 19), ("exp", ctypes.c_float * 8))


class Drawing(ctypes.Structure):
    _fields_ = (("temperature", ctypes.c_double), ("top_k", ctypes.c_int64), ("top_p", ctypes.c_double))


@functools.cache
def library() -> ctypes.CDLL:
    """generate.cpp for this CPU, compiled at its first use and kept in ~/.cache/sashimi. Raises Unavailable."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler")
    try:
        about = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), about, _cpu()))).hexdigest()
        target = Path.home() / ".cache" / "sashimi" / f"native-{key[:16]}.so"
        with suppress(OSError):
            return ctypes.CDLL(str(target))
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / target.name
            command = [compiler, *_FLAGS, "-shared", "-fPIC", str(_SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, text=True)
            loaded = ctypes.CDLL(str(made))
            with suppress(OSError):  # where there is no room for it, it is compiled each time
                target.parent.mkdir(parents=True, exist_ok=True)
                write_file(target, made.read_bytes())
        return loaded
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} failed: {(error.stderr or 'it gave no reason').splitlines()[0]}") from error
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"it cannot be compiled or loaded: {error}") from error


def _cpu() -> bytes:
    """What tells CPUs apart, where the home folder is shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = set(info.read_bytes().splitlines()) if info.exists() else set()
    return b"\n".join(sorted(line for line in lines if line.startswith((b"flags", b"model name", b"Features"))))


def tables() -> Tables:
    """Polynomials for float32, by interpolation at Chebyshev's nodes."""
    erf_end, half = 4.0, math.log(2) / 2

    def erf_ratio(s: np.ndarray) -> np.ndarray:
        z = np.sqrt((s + 1) / 2) * erf_end
        return np.array([math.erf(x) / x for x in z])

    erf = Chebyshev.interpolate(erf_ratio, 18).convert(kind=Polynomial).coef
    exp = Chebyshev.interpolate(np.exp, 7, domain=[-half, half]).convert(kind=Polynomial).coef
    return Tables((ctypes.c_float * 19)(*erf[::-1]), (ctypes.c_float * 8)(*exp[::-1]))
