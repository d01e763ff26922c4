"""torch threads by role: nannies set one thread per process, and a process may host both roles."""

from __future__ import annotations

import threading
from typing import Self

import torch

from dask_isgd.runtime.machine_load import MachineLoad

_lock = threading.Lock()
_learners = 0


class LearnerThreads:
    """The torch threads of a process while its learner runs, whatever its scoring tasks ask for.

    ``own`` threads, and ``spare`` ones more while scorers are idle; no more than other processes leave cores for,
    according to ``load`` (None: they don't follow it).
    """

    def __init__(self, own: int, spare: int = 0, load: MachineLoad | None = None) -> None:
        self._own, self._spare, self._load = own, spare, load

    def __enter__(self) -> Self:
        global _learners
        with _lock:
            _learners += 1
            torch.set_num_threads(self._own)
        return self

    def __exit__(self, *error: object) -> None:
        """Let scoring tasks set the threads again, once all learners of this process have ended."""
        global _learners
        with _lock:
            _learners -= 1

    def resize(self, *, scorers_idle: bool) -> int:
        """Change the threads of the calling learner; return how many it has now."""
        threads = self._own + self._spare * scorers_idle
        if self._load is not None:
            threads = self._load.threads(threads)
        if torch.get_num_threads() != threads:
            with _lock:
                torch.set_num_threads(threads)
        return threads


def learners() -> int:
    """Return how many learners run in this process."""
    return _learners


def start_scorer(threads: int) -> None:
    """Give the process ``threads`` torch threads unless a learner runs in it."""
    with _lock:
        if _learners == 0 and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
