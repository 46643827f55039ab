"""The Cauchy sum of the paper's kernel as one fused PyKeOps reduction: linear memory, compiled at first use."""

import fcntl
import functools
from pathlib import Path
from typing import Any

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


@functools.cache
def _compiled(dtype: torch.dtype, device: str) -> Any:
    """The reduction, forward and backward compiled under a file lock: concurrent compilers break each other."""
    try:
        import pykeops
        from pykeops.torch import Genred
    except ImportError as error:
        raise InputError(
            "model.kernel=cauchy_keops needs PyKeOps: pip install 'sashimi[keops]', or choose kernel=krylov"
        ) from error
    reduction = Genred(_FORMULA, _ARGUMENTS, reduction_op="Sum", axis=1)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    v, w, m, p = (torch.ones(1, 1, dtype=complex_dtype, device=device) for _ in range(4))
    v.requires_grad_()
    w = (w * -0.5j).requires_grad_()
    lock = Path(pykeops.get_build_folder()).parent / "sashimi-compile.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            _apply(reduction, v, w, m[0], p[0]).abs().sum().backward()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"model.kernel=cauchy_keops could not compile ({str(error).splitlines()[0]}): "
                "install a C++ compiler (g++), or choose kernel=krylov"
            ) from error
    return reduction
