"""Scoring tasks that only wait, importable by the workers of ``scale.py``."""

from __future__ import annotations

import threading
import time
from typing import Any

from dask_isgd.scorer.task import ScoreReport

SECONDS = 1.0
_lock = threading.Lock()
_spans: list[tuple[float, float]] = []


def score(tensors: dict[str, Any], spec: Any, chunk: int, incarnation: int, version: int) -> ScoreReport:
    """What ``dask_isgd.scorer.task.score`` returns, after ``SECONDS`` of waiting; the weights stay as they are."""
    wait()
    return ScoreReport(chunk, incarnation, version, spec.chunk, SECONDS, 0.0, 0)


def bare(number: int) -> int:
    """The same for a loop that is not ours."""
    wait()
    return number


def wait() -> None:
    began = time.time()
    time.sleep(SECONDS)
    with _lock:
        _spans.append((began, time.time()))


def busy(since: float, until: float) -> float:
    """Seconds that this process's stubs waited between two times of the clock."""
    with _lock:
        return sum(max(0.0, min(b, until) - max(a, since)) for a, b in _spans)
