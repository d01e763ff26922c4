"""What the dashboard keeps of a run: a bounded amount, however long the run lasts.

Pure: events in, numbers out; no Dask, no Bokeh.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.display.latest_values import COORDINATOR, LEARNER, SUCCEEDED, LatestValues, of_learner
from dask_isgd.events import (
    Control,
    Ended,
    Evaluated,
    Event,
    Fault,
    Group,
    Heartbeat,
    Progress,
    Scored,
    WeightSummary,
    name_of,
)

Floats = NDArray[np.float64]

PROGRESS = (
    *("step", "loss", "steps_per_second", "learned_per_second", "scored_per_second"),
    *("variance_ideal", "variance_stale", "variance_uniform"),
    *("gain", "candidate_gain", "gate", "ess_fraction", "largest_coefficient", "mean_age", "max_age"),
    *("published_behind", "scored_behind"),
)
EVALUATION = ("step", "loss", "error")
_SILENT = 15.0


class Series:
    """Rows of named numbers in the order of their first, which only grows; at most ``capacity`` rows.

    When it is full, every second row is dropped and only half as many are kept from then on: the rows
    are spread evenly over the whole run, and the latest row is always among them.
    """

    def __init__(self, columns: Sequence[str], capacity: int = 600) -> None:
        self.columns = tuple(columns)
        self._rows = np.full((capacity, len(self.columns)), np.nan)
        self._length = 0
        self._stride, self._count = 1, 0
        self._last: Floats | None = None

    def __len__(self) -> int:
        return self._length + (self._last is not None)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, with NaN for missing columns and None; rows from its step on are dropped first."""
        values = np.array([_number(row.get(name)) for name in self.columns])
        self._drop(values[0])
        self._last = values
        count, self._count = self._count, self._count + 1
        if count % self._stride:
            return
        if self._length == len(self._rows):
            kept = self._rows[::2].copy()
            self._length = len(kept)
            self._rows[: self._length] = kept
            self._stride *= 2
        self._rows[self._length] = values
        self._length += 1
        self._last = None

    def _drop(self, first: float) -> None:
        """Drop the rows from ``first`` on: a learner that resumed from a checkpoint repeats these steps."""
        if self._last is not None and self._last[0] >= first:
            self._last = None
        self._length = int(np.searchsorted(self._rows[: self._length, 0], first))

    def __getitem__(self, column: str) -> Floats:
        """Return one column, (n,) float64."""
        at = self.columns.index(column)
        values = self._rows[: self._length, at]
        return values.copy() if self._last is None else np.append(values, self._last[at])


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


@dataclass(frozen=True)
class LogEntry:
    """A fault, a restart, a request or an end."""

    time: float
    """Seconds since 1970, by the scheduler's clock."""
    what: str
    detail: str


class RunRecord:
    """One run, from its events."""

    def __init__(self, run: str) -> None:
        self.run, self.name = run, name_of(run)
        self.progress = Series(PROGRESS)
        self.evaluations = Series(EVALUATION, capacity=400)
        self.log: deque[LogEntry] = deque(maxlen=200)
        self.restarts: deque[float] = deque(maxlen=100)
        """Steps from which a learner resumed."""
        self.weight_summary: WeightSummary | None = None
        self.updated = 0.0
        self.changes = 0
        """Grows with every event that changes what is shown."""
        self._values = LatestValues()
        self._state = "starting"
        self._coordinator = 0
        self._restarted = False
        self._group: tuple[int, int] | None = None
        """How many learn, and how many score that could learn."""
        self._previous: tuple[int, float, float] | None = None

    @property
    def latest(self) -> dict[str, Any]:
        """The latest values by name: those of ``LatestValues``, and what follows from two of them."""
        return self._values.values

    @property
    def faults(self) -> int:
        """The number of faults."""
        return int(self.latest.get("faults", 0))

    def status(self, now: float) -> str:
        """Return ``"starting"``, ``"running"``, ``"paused"``, an outcome, or for how long it has been silent."""
        silent = now - self.updated
        if self._state in ("starting", "running") and silent > _SILENT:
            return f"silent for {silent:.0f} s"
        return self._state

    def apply(self, event: Event, at: float) -> None:
        """Update the record from an event that the scheduler received at ``at``, in seconds since 1970."""
        self.updated = at
        self.changes += not isinstance(event, Heartbeat)
        if self._values.outdated(event):
            return
        before = self._values.incarnation
        self._values.apply(event)
        if of_learner(event):
            self._apply_learner(before, event.incarnation, at)
        elif isinstance(event, Scored) or (isinstance(event, Heartbeat) and event.role == COORDINATOR):
            self._apply_coordinator(event.incarnation, at)
        if isinstance(event, Progress):
            self._apply_progress(event)
        elif isinstance(event, Evaluated):
            self.evaluations.append({"step": event.version, "loss": event.loss, "error": event.error})
        elif isinstance(event, WeightSummary):
            self.weight_summary = event
        elif isinstance(event, Group):
            self._apply_group(event, at)
        elif isinstance(event, Fault):
            self.log.append(LogEntry(at, event.what, event.detail))
        elif isinstance(event, Control):
            self._apply_control(event, at)
        elif isinstance(event, Ended):
            self._apply_end(event, at)

    def _apply_learner(self, before: int, incarnation: int, at: float) -> None:
        if incarnation > before:
            if before:
                self._restarted = True
                self.log.append(LogEntry(at, LEARNER, f"incarnation {incarnation} took over"))
            self._state = "running"
        elif self._state == "starting":
            self._state = "running"

    def _apply_coordinator(self, incarnation: int, at: float) -> None:
        if self._coordinator and incarnation > self._coordinator:
            self.log.append(LogEntry(at, COORDINATOR, f"incarnation {incarnation} took over"))
        self._coordinator = max(self._coordinator, incarnation)

    def _apply_progress(self, event: Progress) -> None:
        latest, step = self.latest, float(event.step)
        if self._restarted:
            self.restarts.append(step)
            self._restarted = False
        # between two events: the few steps of a single report are too short to measure a speed
        now = (event.incarnation, event.values.get("seconds", math.nan), event.values.get("examples", math.nan))
        if self._previous is not None and self._previous[0] == now[0] and now[1] > self._previous[1]:
            latest["learned_per_second"] = (now[2] - self._previous[2]) / (now[1] - self._previous[1])
        self._previous = now
        for name, version in (("published_behind", "version"), ("scored_behind", "scored_version")):
            latest[name] = max(0.0, step - latest[version]) if version in latest else math.nan
        self.progress.append(latest)

    def _apply_group(self, event: Group, at: float) -> None:
        """Log who learns if that has changed: it is repeated now and then."""
        count, before = len(event.learners), self._group
        if (count, event.scorers) == before:
            return
        self._group = count, event.scorers
        if before is not None or count > 1:
            self.log.append(LogEntry(at, "learners", event.why or f"{count} learn"))

    def _apply_control(self, event: Control, at: float) -> None:
        if self._state in ("running", "paused", "starting"):
            self._state = {"pause": "paused", "run": "running"}.get(event.want, self._state)
            self.log.append(LogEntry(at, "asked to", event.want))

    def _apply_end(self, event: Ended, at: float) -> None:
        where = f" at step {event.step:,}" if event.step else ""
        detail = f"{event.outcome}{where}" + (f": {event.message}" if event.message else "")
        self.log.append(LogEntry(at, event.role, detail))
        if event.role == LEARNER and event.outcome not in SUCCEEDED:
            self._state = event.outcome
