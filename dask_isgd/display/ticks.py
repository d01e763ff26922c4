"""Ticks of logarithmic axes: a few round numbers where the curve is. Pure: neither Bokeh nor matplotlib."""

from __future__ import annotations

import math

_MANTISSAS = ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within [``low``, ``high``], both positive: at least two unless the range is a point.

    >>> log_ticks(0.4, 9), log_ticks(1e-4, 1), log_ticks(2.6, 2.9)
    ([0.5, 1.0, 2.0, 3.0, 5.0], [0.0001, 0.001, 0.01, 0.1, 1.0], [2.6, 2.7, 2.8, 2.9])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _MANTISSAS:
        found = [float(f"{m}e{d}") for d in decades for m in mantissas if low <= float(f"{m}e{d}") <= high]
        if len(found) < 3:
            return _linear(low, high, most)
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def _linear(low: float, high: float, most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten within the range: of the smallest step that gives few."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (m * power for m in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{k * step:.6g}") for k in range(first, last + 1)]
