"""How many cores of this machine other processes leave to this one.

torch's threads spin while they wait for each other. Alone they lose nothing by it; beside a busy neighbour, each waits
for one that does not run, and two threads become ten to a hundred times slower than one. Waiting passively
(``OMP_WAIT_POLICY=PASSIVE``) halves the speed of a lone process instead. So the number of threads follows the load.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil

_EVERY = 1.0
"""Seconds between two measurements."""
_TOLERATED = 0.25
"""Cores that others may take before a thread is given up: the scheduler and the worker's own nanny take some."""


class Usage(NamedTuple):
    """Seconds of CPU time since some moment."""

    all: float
    """Of all processes on the cores that this process may run on."""
    own: float
    """Of this process."""


class MachineLoad:
    """Measures, at most once per second, how many of the ``cores`` that this process may run on are free for it."""

    def __init__(
        self,
        cores: int | None = None,
        *,
        read: Callable[[], Usage] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cores = cores or len(_affinity())
        self._read, self._clock = read or _usage, clock
        self._began, self._before = clock(), self._read()
        self._others = 0.0

    def threads(self, wanted: int) -> int:
        """Return how many of ``wanted`` threads have a core to themselves, at least 1."""
        now = self._clock()
        seconds = now - self._began
        if seconds >= _EVERY:
            usage = self._read()
            others = (usage.all - self._before.all) - (usage.own - self._before.own)
            self._others = max(0.0, others / seconds)
            self._began, self._before = now, usage
        return max(1, min(wanted, int(self.cores - self._others + _TOLERATED)))


def _affinity() -> list[int]:
    process = psutil.Process()
    # macOS has no affinity: every core is allowed
    return list(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else list(range(os.cpu_count() or 1))


def _usage() -> Usage:
    allowed = set(_affinity())
    total = 0.0
    for core, spent in enumerate(psutil.cpu_times(percpu=True)):
        if core in allowed:
            idle = spent.idle + getattr(spent, "iowait", 0.0)
            # Linux counts a guest's time as its host's user time too
            guests = getattr(spent, "guest", 0.0) + getattr(spent, "guest_nice", 0.0)
            total += sum(spent) - guests - idle
    own = os.times()
    return Usage(total, own.user + own.system)
