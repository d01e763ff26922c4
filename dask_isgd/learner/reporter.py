"""Reports the learner's steps: rows of the history, some of which are announced as events."""

from __future__ import annotations

import math
import statistics
import time
from typing import Protocol

from dask_isgd import columns
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.step import Step
from dask_isgd.runtime.announcer import Announcer

COLUMNS = columns.NAMES
_ANNOUNCE_EVERY = 0.5


class Write(Protocol):
    """Receives a row of ``COLUMNS``; with ``write``, the rows that wait are written to disk."""

    def __call__(self, row: dict[str, float], *, write: bool) -> None: ...


class Reporter:
    """Reports means over the steps since the last report, one row each; at most two rows per second are announced.

    The run takes ``steps`` steps (None: nobody knows) of ``batch_size`` examples.
    """

    def __init__(
        self, announcer: Announcer, write: Write, *, steps: int | None, batch_size: int, synchronous: bool = False
    ) -> None:
        self._announcer, self._write = announcer, write
        self._run_steps, self._batch_size, self._synchronous = steps, batch_size, synchronous
        self._steps: list[Step] = []
        self._reported = self._announced = time.monotonic()

    def add(self, result: Step) -> None:
        """Add a step to the next report."""
        self._steps.append(result)

    def report(
        self,
        step: int,
        batch_sampler: BatchSampler,
        *,
        seconds: float,
        learning_rate: float,
        threads: int,
        learners: int = 1,
        learners_scoring: int = 0,
        roles_worth: float = math.nan,
    ) -> None:
        """Report after ``step`` steps, the last of them measured, and ``seconds`` of training by all incarnations."""
        now, steps = time.monotonic(), self._steps
        row: dict[str, float] = {
            "step": step,
            "seconds": seconds,
            "examples": step * self._batch_size,
            "loss": math.fsum(s.loss for s in steps) / len(steps),
            "gradient_norm": statistics.fmean(s.gradient_norm for s in steps),
            "clipped": sum(s.clipped for s in steps) / len(steps),
            "clip_bias": steps[-1].clip_bias,
            "learning_rate": learning_rate,
            "steps_per_second": len(steps) / max(now - self._reported, 1e-9),
            "mean_gradient_sq_norm": steps[-1].mean_gradient_sq_norm,
            "threads": threads,
            "learners": learners,
            "learners_scoring": learners_scoring,
            "roles_worth": roles_worth,
            **batch_sampler.report(step),
        }
        self._steps, self._reported = [], now
        due = now - self._announced >= _ANNOUNCE_EVERY or (self._run_steps is not None and step >= self._run_steps)
        self._write({name: float(row[name]) for name in COLUMNS}, write=due)
        if due:
            self._announced = now
            self._announcer.progress(
                step,
                self._run_steps,
                {name: float(f"{row[name]:.6g}") for name in columns.ANNOUNCED},
                gate_open=batch_sampler.open,
                probing=batch_sampler.gate.probing and not self._synchronous,
                why=batch_sampler.gate.reason,
            )
