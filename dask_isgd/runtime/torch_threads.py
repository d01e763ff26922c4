"""torch threads by role: nannies set one thread for all, and a process may host both roles."""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()
_learners = 0


def learner(threads: int) -> None:
    """Give the process ``threads`` torch threads, whatever its scoring tasks ask for."""
    global _learners
    with _lock:
        _learners += 1
        torch.set_num_threads(threads)


def learner_has(threads: int) -> int:
    """Change the torch threads of the learner that calls; how many it has now."""
    if torch.get_num_threads() != threads:
        with _lock:
            torch.set_num_threads(threads)
    return threads


def learner_left() -> None:
    """The learner of this process has ended."""
    global _learners
    with _lock:
        _learners -= 1


def scorer(threads: int) -> None:
    """Give the process ``threads`` torch threads unless a learner lives here."""
    with _lock:
        if _learners == 0 and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
