"""Processes as the kernel counts them (Linux): page faults and CPU time, cores, descendants."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

Cores = set[int] | None
"""The cores that a process may use; None: all."""
HANDICAPS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "DASK_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables that change the speed of a process begin with these."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What processes have used by a moment, or between two of them."""

    page_faults: int
    user: float
    """Seconds of CPU time in the program."""
    system: float
    """Seconds of CPU time in the kernel."""

    def __sub__(self, before: Usage) -> Usage:
        return Usage(self.page_faults - before.page_faults, self.user - before.user, self.system - before.system)

    @property
    def cpu(self) -> float:
        """Seconds of CPU time."""
        return self.user + self.system

    @property
    def system_share(self) -> float:
        """The kernel's share of CPU time; NaN if none was used."""
        return self.system / self.cpu if self.cpu else math.nan


def usage(pids: Iterable[int]) -> Usage:
    """Return what the processes and their living descendants have used: minor page faults, and CPU time."""
    faults = user = system = 0
    for pid in pids:
        for each in tree(pid):
            # after the last parenthesis: a program's name may hold spaces
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            faults, user, system = faults + int(fields[7]), user + int(fields[11]), system + int(fields[12])
    return Usage(faults, user / _TICKS, system / _TICKS)


def tree(pid: int) -> list[int]:
    """Return the process and its descendants."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes and their descendants."""
    for pid in pids:
        for each in tree(pid):
            os.kill(each, number)


def pin(cores: set[int]) -> int:
    """Pin all threads of this process, and those started later; return its id. Run on workers."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:  # the thread has ended
            continue
    return os.getpid()


@contextmanager
def pinned(cores: Cores) -> Iterator[None]:
    """Pin this process, and the processes started meanwhile, unless ``cores`` is None."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        pin(cores)
    try:
        yield
    finally:
        pin(before)


@contextmanager
def clean_environment() -> Iterator[None]:
    """Remove what would change the speed of the processes started meanwhile, and let them import these modules.

    Afterwards the environment is what it was: Dask's nannies leave ``MALLOC_TRIM_THRESHOLD_`` and ``OMP_NUM_THREADS``
    in that of the process which starts workers, where the next plain loop would inherit them.
    """
    before = dict(os.environ)
    paths = [str(Path(__file__).parent), *filter(None, [before.get("PYTHONPATH")])]
    clean = {name: value for name, value in before.items() if not name.startswith(HANDICAPS)}
    replace_environment(clean | {"PYTHONPATH": os.pathsep.join(paths)})
    try:
        yield
    finally:
        replace_environment(before)


def replace_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
