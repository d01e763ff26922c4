"""What is remembered of a run that is watched: a bounded amount, however long it lasts.

Pure: events in, numbers out; no Dask, no Bokeh.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dask_isgd.events import (
    Control,
    Ended,
    Evaluated,
    Event,
    Fault,
    Heartbeat,
    Progress,
    Published,
    Scored,
    WeightSummary,
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

    When it is full every second row goes and half as many are taken from then on: the whole run
    stays in sight, evenly, and the newest row is always there.
    """

    def __init__(self, columns: Sequence[str], capacity: int = 600) -> None:
        self.columns = tuple(columns)
        self._rows = np.full((capacity, len(self.columns)), np.nan)
        self._length = 0
        self._every, self._turn = 1, 0
        self._newest: Floats | None = None

    def __len__(self) -> int:
        return self._length + (self._newest is not None)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; columns that are missing or None become NaN. Rows it does not come after are dropped first."""
        values = np.array([_number(row.get(name)) for name in self.columns])
        self._drop(values[0])
        self._newest = values
        turn, self._turn = self._turn, self._turn + 1
        if turn % self._every:
            return
        if self._length == len(self._rows):
            kept = self._rows[::2].copy()
            self._length = len(kept)
            self._rows[: self._length] = kept
            self._every *= 2
        self._rows[self._length] = values
        self._length += 1
        self._newest = None

    def _drop(self, first: float) -> None:
        """A learner that went on from a checkpoint reaches steps again: what was lost is forgotten."""
        if self._newest is not None and self._newest[0] >= first:
            self._newest = None
        self._length = int(np.searchsorted(self._rows[: self._length, 0], first))

    def __getitem__(self, column: str) -> Floats:
        """One column, (n,) float64."""
        at = self.columns.index(column)
        values = self._rows[: self._length, at]
        return values.copy() if self._newest is None else np.append(values, self._newest[at])


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


@dataclass(frozen=True)
class Happening:
    """Something that people want to know about, once."""

    time: float
    """Seconds since 1970, by the scheduler's clock."""
    what: str
    detail: str


class RunRecord:
    """One run, from its events."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.progress = Series(PROGRESS)
        self.evaluations = Series(EVALUATION, capacity=400)
        self.happenings: deque[Happening] = deque(maxlen=200)
        self.restarts: deque[float] = deque(maxlen=100)
        """Steps at which a learner went on."""
        self.faults = 0
        self.portrait: WeightSummary | None = None
        self.latest: dict[str, float] = {}
        """The newest value of everything."""
        self.updated = 0.0
        self.changes = 0
        """Grows with every event that shows."""
        self._state = "starting"
        self._incarnation = 0
        self._coordinator = 0
        self._restarted = False
        self._learned: tuple[int, float, float] | None = None

    def status(self, now: float) -> str:
        """``"starting"``, ``"running"``, ``"paused"``, an outcome, or for how long it has been silent."""
        silent = now - self.updated
        if self._state in ("starting", "running") and silent > _SILENT:
            return f"silent for {silent:.0f} s"
        return self._state

    def take(self, event: Event, at: float) -> None:
        """Remember what an event says; ``at`` is when the scheduler heard it, seconds since 1970."""
        self.updated = max(self.updated, at)
        self.changes += not isinstance(event, Heartbeat)
        latest = self.latest
        if isinstance(event, (Progress, Published)):
            if event.incarnation < self._incarnation:
                return  # a learner that has a successor
            self._learner(event.incarnation, at)
            latest["incarnation"] = event.incarnation
        if isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Published):
            latest["version"] = event.version
        elif isinstance(event, Scored):
            self._coordinate(event.incarnation, at)
            latest["scored_per_second"], latest["examples_scored"] = event.per_second, event.examples
            if event.chunks:
                latest["scored_version"] = max(version for *_, version in event.chunks)
        elif isinstance(event, Evaluated):
            latest["validation_error"], latest["validation_loss"] = event.error, event.loss
            self.evaluations.append({"step": event.version, "loss": event.loss, "error": event.error})
        elif isinstance(event, WeightSummary):
            self.portrait = event
        elif isinstance(event, Fault):
            self.faults += 1
            self.happenings.append(Happening(at, event.what, event.detail))
        elif isinstance(event, Control):
            if self._state in ("running", "paused", "starting"):
                self._state = {"pause": "paused", "run": "running"}.get(event.want, self._state)
                self.happenings.append(Happening(at, "asked to", event.want))
        elif isinstance(event, Heartbeat) and event.role == "coordinator":
            self._coordinate(event.incarnation, at)
        elif isinstance(event, Ended):
            self._end(event, at)

    def _learner(self, incarnation: int, at: float) -> None:
        if incarnation > self._incarnation:
            if self._incarnation:
                self._restarted = True
                self.happenings.append(Happening(at, "learner", f"incarnation {incarnation} took over"))
            self._incarnation, self._state = incarnation, "running"
        elif self._state == "starting":
            self._state = "running"

    def _coordinate(self, incarnation: int, at: float) -> None:
        if self._coordinator and incarnation > self._coordinator:
            self.happenings.append(Happening(at, "coordinator", f"incarnation {incarnation} took over"))
        self._coordinator = max(self._coordinator, incarnation)

    def _progress(self, event: Progress) -> None:
        latest, step = self.latest, float(event.step)
        if self._restarted:
            self.restarts.append(step)
            self._restarted = False
        latest.update(event.values)
        latest["step"], latest["gate"] = step, float(event.open)
        # from one event to the next: a single report's few steps say little about the speed
        now = (event.incarnation, event.values.get("seconds", math.nan), event.values.get("examples", math.nan))
        if self._learned is not None and self._learned[0] == now[0] and now[1] > self._learned[1]:
            latest["learned_per_second"] = (now[2] - self._learned[2]) / (now[1] - self._learned[1])
        self._learned = now
        for name, version in (("published_behind", "version"), ("scored_behind", "scored_version")):
            latest[name] = max(0.0, step - latest.get(version, math.nan)) if version in latest else math.nan
        self.progress.append(latest)

    def _end(self, event: Ended, at: float) -> None:
        where = f" at step {event.step:,}" if event.step else ""
        detail = f"{event.outcome}{where}" + (f": {event.message}" if event.message else "")
        self.happenings.append(Happening(at, event.role, detail))
        if event.role == "learner" and event.outcome not in ("left", "fenced"):
            self._state = event.outcome
