"""What activations.h computes GELU and the logistic function by."""

import ctypes
import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial, chebyshev


class Tables(ctypes.Structure):
    _fields_ = (("above", ctypes.c_float * 6), ("below", ctypes.c_float * 6), ("exp", ctypes.c_float * 7))


@functools.cache
def tables() -> Tables:
    """For float32: the fraction by least squares at Chebyshev's nodes, exp by interpolation there."""
    end, half = 5.75, math.log(2) / 2  # the ends as in activations.h

    def ratio(s: np.ndarray) -> np.ndarray:  # of Φ, the normal distribution's
        return np.array([0.5 * math.erf(x / math.sqrt(2)) / x for x in end * np.sqrt((s + 1) / 2)])

    squares = Polynomial([-1, 2 / end**2])
    exp = Chebyshev.interpolate(np.exp, 6, domain=[-half, half]).convert(kind=Polynomial)
    fitted = (*(part.convert(kind=Polynomial)(squares) for part in _fraction(ratio, 5)), exp)
    return Tables(*(type_(*one.coef[::-1]) for one, (_, type_) in zip(fitted, Tables._fields_, strict=True)))


def _fraction(function: Callable[[np.ndarray], np.ndarray], degree: int) -> tuple[Chebyshev, Chebyshev]:
    """Whose quotient is near `function` on [-1, 1], by relative errors."""
    nodes = chebyshev.chebpts1(400)
    values, powers, below = function(nodes), chebyshev.chebvander(nodes, degree), np.ones(400)
    for _ in range(2):  # above - values below = 0, where below's first coefficient is 1, is linear in the others
        equations = np.hstack((powers / values[:, None], -powers[:, 1:])) / below[:, None]
        solved = np.linalg.lstsq(equations, 1 / below, rcond=None)[0]
        coefficients = np.r_[1, solved[degree + 1 :]]
        below = powers @ coefficients
    return Chebyshev(solved[: degree + 1]), Chebyshev(coefficients)
