"""Which version counts: plain comparisons, no Dask, no clock.

A version is ordered by (incarnation of the learner, its step). Two learners may run for a while
when Dask moves the task; whoever listens hears the younger one only, from the moment it speaks.
"""

from __future__ import annotations

Order = tuple[int, int]
"""Incarnation and version."""


class LatestVersion:
    """Lets every version through once, and none that is older than one it let through.

    >>> newest = LatestVersion()
    >>> [newest.accepts(order) for order in [(1, 0), (1, 32), (2, 20), (1, 64), (2, 20), (2, 40)]]
    [True, True, True, False, False, True]
    """

    def __init__(self, floor: Order = (0, -1)) -> None:
        self.order = floor

    def accepts(self, order: Order) -> bool:
        """Whether ``order`` is newer than all before; from then on it is the newest."""
        if order <= self.order:
            return False
        self.order = order
        return True
