"""What the learner says of its steps: rows of the history, and now and then one of them as an event."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Protocol

from dask_isgd.core.spec import RunSpec
from dask_isgd.events import Event, Progress
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.trainer import Step

SAID = (
    *("step", "seconds", "examples", "loss", "gradient_norm", "clipped", "learning_rate", "steps_per_second"),
    *("mean_gradient_sq_norm", "variance_ideal", "variance_stale", "variance_uniform"),
    *("gain", "candidate_gain", "chunk_gain", "ideal_gain", "gate"),
    *("ess_fraction", "largest_coefficient", "mean_weight", "scored_fraction", "mean_age", "max_age"),
)
"""What of a row is announced: an event stays below a kilobyte."""
COLUMNS = (
    *SAID,
    *("variance_ideal_error", "variance_stale_error", "variance_uniform_error", "gain_error", "candidate_gain_error"),
    *("smoothing_factor", "staleness_factor", "gate_gain", "gate_state", "threads"),
)
_SAY_EVERY = 0.5


class Write(Protocol):
    """Takes a row of ``COLUMNS``; ``write`` puts the rows that wait on disk."""

    def __call__(self, row: dict[str, float], *, write: bool) -> None: ...


class Reporter:
    """Means over the steps since the last report, one row each time; at most two a second are announced."""

    def __init__(
        self, spec: RunSpec, incarnation: int, address: str, write: Write, say: Callable[[Event], None]
    ) -> None:
        self._spec, self._incarnation, self._address = spec, incarnation, address
        self._write, self._say = write, say
        self._steps: list[Step] = []
        self._reported = self._said = time.monotonic()

    def add(self, result: Step) -> None:
        """A step was taken."""
        self._steps.append(result)

    def report(self, step: int, drawing: BatchSampler, *, seconds: float, learning_rate: float, threads: int) -> None:
        """``step`` steps are done, the last of them a probe; ``seconds`` the run has been trained for."""
        now, steps = time.monotonic(), self._steps
        measured = [s.gradient_norm for s in steps if not math.isnan(s.gradient_norm)]
        row: dict[str, float] = {
            "step": step,
            "seconds": seconds,
            "examples": step * self._spec.learning.batch_size,
            "loss": math.fsum(s.loss for s in steps) / len(steps),
            "gradient_norm": statistics.fmean(measured) if measured else math.nan,
            "clipped": sum(s.clipped for s in steps) / len(steps),
            "learning_rate": learning_rate,
            "steps_per_second": len(steps) / max(now - self._reported, 1e-9),
            "mean_gradient_sq_norm": steps[-1].mean_gradient_sq_norm,
            "threads": threads,
            **drawing.report(step),
        }
        self._steps, self._reported = [], now
        say = now - self._said >= _SAY_EVERY or step >= self._spec.learning.steps
        self._write({name: float(row[name]) for name in COLUMNS}, write=say)
        if say:
            self._said = now
            self._announce(step, row, drawing)

    def _announce(self, step: int, row: dict[str, float], drawing: BatchSampler) -> None:
        self._say(
            Progress(
                run=self._spec.run,
                incarnation=self._incarnation,
                step=step,
                address=self._address,
                open=drawing.open,
                probing=drawing.gate.probing and not self._spec.learning.synchronous,
                why=drawing.gate.reason,
                values={name: float(f"{row[name]:.6g}") for name in SAID},
            )
        )
