"""How much is scored: everything the scorers can while it pays, a probe while it does not."""

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
    """Scoring tasks that may be submitted now.

    ``slots``: tasks the scorers take at once, ``in_flight``: those they have. Otherwise all free slots; when
    ``probing``, one task at a time, and only if the scorers' time spent on tasks stays within a
    twentieth with it: ``busy_seconds`` since probing began, of ``slots`` × ``elapsed_seconds``,
    where the next task takes about ``task_seconds``. The first task therefore waits for its turn
    too: 20 × task_seconds / slots.

    >>> may_start(8, 3, probing=False)
    5
    >>> may_start(8, 0, probing=True, busy_seconds=3.0, elapsed_seconds=10.0, task_seconds=1.0)
    1
    >>> may_start(8, 0, probing=True, busy_seconds=3.5, elapsed_seconds=10.0, task_seconds=1.0)
    0
    """
    for name, value in (("slots", slots), ("in_flight", in_flight), ("busy_seconds", busy_seconds)):
        if value < 0:
            raise DataError(f"{name}: got {value}, wanted none or more; count what there is")
    if not probing:
        return max(0, slots - in_flight)
    within = busy_seconds + task_seconds <= PROBE_SHARE * slots * elapsed_seconds
    return 1 if slots > 0 and in_flight == 0 and within else 0
