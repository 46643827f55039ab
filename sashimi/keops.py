"""The Cauchy sum of the paper's kernel as one fused PyKeOps reduction: linear memory, compiled at first use."""

import atexit
import fcntl
import functools
import os
import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sashimi.errors import InputError

# The conjugate pair of a mode is summed explicitly, as complex numbers stored as pairs of reals.
_FORMULA = "ComplexDivide(v, m - ComplexMult(p, w)) + ComplexDivide(Conj(v), m - ComplexMult(p, Conj(w)))"
_ARGUMENTS = ["v = Vj(2)", "w = Vj(2)", "m = Vi(2)", "p = Vi(2)"]


def cauchy_sum(v: Tensor, w: Tensor, m: Tensor, p: Tensor) -> Tensor:
    """Σ_n v_n/(m − p w_n) + v̄_n/(m − p w̄_n). v, w: (H, N/2), m, p: (M,) complex -> (H, M).

    Raises `InputError` where PyKeOps or its C++ compiler is missing.
    """
    reduction = _compiled(v.real.dtype, v.device.type)
    return _apply(reduction, v, w, m, p)


def _apply(reduction: Any, v: Tensor, w: Tensor, m: Tensor, p: Tensor) -> Tensor:
    H = v.shape[0]
    nodes = [torch.view_as_real(z).expand(H, -1, -1).contiguous() for z in (m, p)]
    modes = [torch.view_as_real(z.resolve_conj()).contiguous() for z in (v, w)]
    backend = "GPU_1D" if v.device.type == "cuda" else "CPU"
    return torch.view_as_complex(reduction(*modes, *nodes, backend=backend))


def _cache_folder() -> Path:
    return Path(os.environ.get("KEOPS_CACHE_FOLDER", Path.home() / ".cache"))


@functools.cache
def _lock() -> IO[str]:
    _cache_folder().mkdir(parents=True, exist_ok=True)
    return (_cache_folder() / "sashimi-keops.lock").open("w")


@functools.cache
def _compiled(dtype: torch.dtype, device: str) -> Any:
    """The reduction, forward and backward compiled.

    PyKeOps reads its cache (and on GPU machines compiles) at import, compiles at first use, and rewrites the cache
    at exit; another process in the midst of one breaks each of these, so all three happen under one file lock.
    """
    fcntl.flock(_lock(), fcntl.LOCK_EX)
    try:
        from pykeops.torch import Genred

        atexit.register(fcntl.flock, _lock(), fcntl.LOCK_EX)  # runs before PyKeOps's own; released by the exit
        reduction = Genred(_FORMULA, _ARGUMENTS, reduction_op="Sum", axis=1)
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        with torch.inference_mode(False), torch.enable_grad():
            v, w, m, p = (torch.ones(1, 1, dtype=complex_dtype, device=device) for _ in range(4))
            v.requires_grad_()
            w = (w * -0.5j).requires_grad_()
            _apply(reduction, v, w, m[0], p[0]).abs().sum().backward()
    except ModuleNotFoundError as error:
        if error.name not in ("pykeops", "pykeops.torch"):
            raise _not_compiled(error) from error
        raise InputError(
            "model.kernel=cauchy_keops needs PyKeOps: pip install pykeops, or choose kernel=krylov"
        ) from error
    except (ImportError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _not_compiled(error) from error
    finally:
        fcntl.flock(_lock(), fcntl.LOCK_UN)
    return reduction


def _not_compiled(error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return InputError(
        f"model.kernel=cauchy_keops could not compile ({reason}): install a C++ compiler (g++), "
        f"or remove PyKeOps's folder under {_cache_folder()} if a compilation was cut off, or choose kernel=krylov"
    )
