"""Exponentially weighted averages of several numbers observed together, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

_NORMAL = 1.959964
"""The 97.5 % quantile of the normal distribution."""


class EWMA:
    """The exponentially weighted moving averages of P named numbers; false while it has no observation.

    Each observation multiplies the weights v of all earlier ones by ``decay`` and has weight 1 - ``decay`` itself.
    From Σ v, Σ v x, Σ v² x xᵀ and the like the covariance of the averages m is known at any time:
    (Σ v² (x - m)(x - m)ᵀ)/(Σ v)², enlarged because only a small number of observations counts.
    """

    def __init__(self, names: Sequence[str], decay: float) -> None:
        self.decay, self._names = decay, {name: i for i, name in enumerate(names)}
        p = len(names)
        self._weight = self._weight2 = 0.0
        self._sum, self._sum2, self._products = np.zeros(p), np.zeros(p), np.zeros((p, p))

    def __bool__(self) -> bool:
        return self._weight > 0

    def __getitem__(self, name: str) -> float:
        return float(self._sum[self._names[name]]) / self._weight

    def add(self, values: Sequence[float]) -> bool:
        """Add one observation (P,). It is ignored, and False returned, if any value is not finite."""
        x = np.asarray(values, np.float64)
        if not np.isfinite(x).all():
            return False
        old, new = self.decay, 1.0 - self.decay
        self._weight = old * self._weight + new
        self._sum = old * self._sum + new * x
        self._weight2 = old**2 * self._weight2 + new**2
        self._sum2 = old**2 * self._sum2 + new**2 * x
        self._products = old**2 * self._products + new**2 * np.outer(x, x)
        return True

    def half_width(self, gradient: Mapping[str, float]) -> float:
        """Return half the width of the 95 % interval around a function of the averages; NaN after one observation.

        ``gradient`` holds the function's derivatives by name. The quantile is Student's, for as many degrees of
        freedom as observations count, (Σ v)²/Σ v², less one.
        """
        count = self._weight**2 / self._weight2 if self else 0.0
        if count < 1.0 + 1e-9:
            return math.nan
        slope = np.zeros(len(self._names))
        for name, value in gradient.items():
            slope[self._names[name]] = value
        mean = self._sum / self._weight
        cross = np.outer(self._sum2, mean)
        scatter = self._products - cross - cross.T + self._weight2 * np.outer(mean, mean)
        variance = float(slope @ scatter @ slope) / self._weight**2 / (1.0 - 1.0 / count)
        return student_quantile(count - 1.0) * math.sqrt(max(0.0, variance))

    def state(self) -> list[float]:
        """Return the sums as plain floats, for :meth:`restore`."""
        arrays = (self._sum, self._sum2, self._products.ravel())
        return [self._weight, self._weight2, *(float(x) for array in arrays for x in array)]

    def restore(self, state: Sequence[float]) -> None:
        """Continue from ``state()``."""
        p = len(self._names)
        self._weight, self._weight2 = float(state[0]), float(state[1])
        rest = np.asarray(state[2:], np.float64)
        self._sum, self._sum2, self._products = rest[:p], rest[p : 2 * p], rest[2 * p :].reshape(p, p)


def student_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's distribution, by its Cornish-Fisher expansion.

    The error is 1 % at 3 degrees of freedom and falls quickly; below 1 the value at 1 is returned.
    """
    z = _NORMAL
    f = max(freedom, 1.0)
    first = (z**3 + z) / 4.0
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
    third = (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / 384.0
    return z + first / f + second / f**2 + third / f**3
