"""Curves for people: a running mean that bends no trend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def smooth(values: Array, width: int) -> Array:
    """Centred running mean over ``width`` finite neighbours; NaN stays NaN.

    At the ends the window shrinks on both sides, so that a trend is not bent.
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
