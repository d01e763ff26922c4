"""The order of versions of the parameters: plain comparisons, no Dask, no clock.

A version is ordered by (incarnation of the learner, its step). Two learners may run for a while
when Dask moves the task; from the first version of the younger one, the older one is ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Number = TypeVar("Number", float, NDArray[np.float64])

Order = tuple[int, int]
"""Incarnation and version."""

_MOST_STEPS = 1e12


def sort_key(incarnation: Number, version: Number) -> Number:
    """Return a float that sorts as (incarnation, version) does; of arrays, an array. NaN (no version) stays NaN.

    Exact for versions below 10^12 and incarnations below 9,000.

    >>> sort_key(2, 20) > sort_key(1, 64) > sort_key(1, 32)
    True
    """
    return incarnation * _MOST_STEPS + version


class LatestVersion:
    """Accepts every version once, and none that is older than one it has accepted.

    >>> latest = LatestVersion()
    >>> [latest.accepts(order) for order in [(1, 0), (1, 32), (2, 20), (1, 64), (2, 20), (2, 40)]]
    [True, True, True, False, False, True]
    """

    def __init__(self, floor: Order = (0, -1)) -> None:
        self.order = floor

    def accepts(self, order: Order) -> bool:
        """Whether ``order`` is later than all before; if so, it is the latest from now on."""
        if order <= self.order:
            return False
        self.order = order
        return True
