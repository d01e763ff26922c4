"""How much is scored: as much as the scorers can while it pays, otherwise only a probe."""

from __future__ import annotations

from dask_isgd.errors import DataError
from dask_isgd.sampling.schedule import PROBE_SHARE


def may_start(
    slots: int,
    in_flight: int,
    *,
    probing: bool,
    busy_seconds: float = 0.0,
    elapsed_seconds: float = 0.0,
    task_seconds: float = 0.0,
) -> int:
    """Return how many scoring tasks may be submitted now.

    ``slots``: tasks that the scorers run at once, ``in_flight``: tasks they have. All free slots may be
    used, except when ``probing``: then one task at a time, and only if tasks have taken, with this one of
    about ``task_seconds``, no more than a twentieth of the scorers' time since probing began:
    ``busy_seconds`` of ``slots`` × ``elapsed_seconds``. So the first task waits too, for
    20 × task_seconds / slots.

    >>> may_start(8, 3, probing=False)
    5
    >>> may_start(8, 0, probing=True, busy_seconds=3.0, elapsed_seconds=10.0, task_seconds=1.0)
    1
    >>> may_start(8, 0, probing=True, busy_seconds=3.5, elapsed_seconds=10.0, task_seconds=1.0)
    0
    """
    for name, value in (("slots", slots), ("in_flight", in_flight), ("busy_seconds", busy_seconds)):
        if value < 0:
            raise DataError(f"{name}: got {value}, wanted 0 or more")
    if not probing:
        return max(0, slots - in_flight)
    within = busy_seconds + task_seconds <= PROBE_SHARE * slots * elapsed_seconds
    return 1 if slots > 0 and in_flight == 0 and within else 0
