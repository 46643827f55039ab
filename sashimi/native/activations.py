"""What activations.h computes GELU and the logistic function by."""

import ctypes
import functools
import math

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial


class Tables(ctypes.Structure):
    _fields_ = (("erf", ctypes.c_float * 19), ("exp", ctypes.c_float * 8), ("slope", ctypes.c_float * 22))


@functools.cache
def tables() -> Tables:
    """Polynomials for float32, by interpolation at Chebyshev's nodes."""
    erf_end, slope_end, half = 4, 6, math.log(2) / 2  # the ends as in activations.h

    def erf_ratio(s: np.ndarray) -> np.ndarray:
        return np.array([math.erf(z) / z for z in erf_end * np.sqrt((s + 1) / 2)])

    def slope_ratio(s: np.ndarray) -> np.ndarray:  # GELU' is Φ + x φ, with the normal distribution's
        x = slope_end * np.sqrt((s + 1) / 2)
        density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return np.array([0.5 * math.erf(z / math.sqrt(2)) / z for z in x]) + density

    def highest_first(polynomial: Chebyshev, type_: type) -> ctypes.Array:
        return type_(*polynomial.convert(kind=Polynomial).coef[::-1])

    fitted = (
        Chebyshev.interpolate(erf_ratio, 18),
        Chebyshev.interpolate(np.exp, 7, domain=[-half, half]),
        Chebyshev.interpolate(slope_ratio, 21),
    )
    return Tables(*(highest_first(one, type_) for one, (_, type_) in zip(fitted, Tables._fields_, strict=True)))
