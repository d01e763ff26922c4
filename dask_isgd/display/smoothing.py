"""Smooth curves: a running mean that does not bend a trend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def smooth(values: Array, width: int) -> Array:
    """Return the centred running mean over ``width`` values, of which only the finite ones count; NaN stays NaN.

    Near the ends the window shrinks on both sides, so that a trend is not bent.
    """
    n = len(values)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(n)
    half = np.minimum(width // 2, np.minimum(at, n - 1 - at))
    low, high = at - half, at + half + 1
    mean = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
    return np.where(finite, mean, np.nan)
