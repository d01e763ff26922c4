"""torch threads by role: nannies set one thread per process, and a process may host both roles."""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()
_learners = 0


def start_learner(threads: int) -> None:
    """Give the process ``threads`` torch threads until its learner ends, whatever its scoring tasks ask for."""
    global _learners
    with _lock:
        _learners += 1
        torch.set_num_threads(threads)


def learners() -> int:
    """Return how many learners run in this process."""
    return _learners


def resize_learner(threads: int) -> int:
    """Change the torch threads of the calling learner; return how many it has now."""
    if torch.get_num_threads() != threads:
        with _lock:
            torch.set_num_threads(threads)
    return threads


def end_learner() -> None:
    """Let scoring tasks set the torch threads of this process again, once all its learners have ended."""
    global _learners
    with _lock:
        _learners -= 1


def start_scorer(threads: int) -> None:
    """Give the process ``threads`` torch threads unless a learner runs in it."""
    with _lock:
        if _learners == 0 and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
