"""Scoring tasks that only wait; the workers of ``scale.py`` import them."""

from __future__ import annotations

import threading
import time
from typing import Any

from dask_isgd.scorer.task import ScoreReport

SECONDS = 1.0
_lock = threading.Lock()
_spans: list[tuple[float, float]] = []


def score(tensors: dict[str, Any], spec: Any, chunk: int, incarnation: int, version: int) -> ScoreReport:
    """Wait for ``SECONDS`` and return the same as ``dask_isgd.scorer.task.score``; the weights do not change."""
    wait()
    return ScoreReport(chunk, incarnation, version, spec.chunk, SECONDS, 0.0, 0)


def bare(number: int) -> int:
    """Do the same in a plain Dask loop."""
    wait()
    return number


def wait() -> None:
    began = time.time()
    time.sleep(SECONDS)
    with _lock:
        _spans.append((began, time.time()))


def busy(since: float, until: float) -> float:
    """Return the seconds for which this process's stubs waited between two clock times."""
    with _lock:
        return sum(max(0.0, min(b, until) - max(a, since)) for a, b in _spans)
