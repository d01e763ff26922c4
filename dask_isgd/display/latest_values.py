"""The latest values of a run, folded from its events. Pure: no Dask, no torch, no clock."""

from __future__ import annotations

from typing import Any

from dask_isgd.events import Control, Ended, Evaluated, Event, Fault, Heartbeat, Progress, Published, Scored

LEARNER, COORDINATOR = "learner", "coordinator"
SUCCEEDED = ("left", "fenced", "superseded")
"""Outcomes after which a long task has a successor: the run has not ended."""


def of_learner(event: Event) -> bool:
    """Return whether the learner sent the event while it was running."""
    return isinstance(event, Progress | Published) or (isinstance(event, Heartbeat) and event.role == LEARNER)


class LatestValues:
    """The latest values of one run by name, and which of its long tasks have ended.

    Events of a learner that has a successor change nothing. A successor's first publication sets
    ``step`` back to the checkpoint that it resumed from.
    """

    def __init__(self, **initial: Any) -> None:
        self.values: dict[str, Any] = initial
        """The columns that progress events carry, and ``incarnation``, ``step``, ``gate``, ``version``,
        ``scored_version``, ``checkpoint``, ``learner`` (its worker's address), ``examples_scored``,
        ``scored_per_second``, ``validation_error``, ``validation_loss``, ``evaluated`` (a version), ``want``,
        ``faults`` (a count) and ``fault``."""
        self.ended: dict[str, Ended] = {}
        """By role, the event that ended the task; none for a task that has a successor."""
        self._incarnation = 0
        self.learner_waits = False
        """Whether the learner's task is waiting for a worker that can run it."""

    @property
    def incarnation(self) -> int:
        """The latest incarnation of the learner; 0 before its first event."""
        return self._incarnation

    def outdated(self, event: Event) -> bool:
        """Return whether the event comes from a learner that has a successor."""
        return of_learner(event) and event.incarnation < self.incarnation

    def apply(self, event: Event) -> None:
        """Update the values from the next event of the run."""
        values = self.values
        if self.outdated(event):
            return
        if of_learner(event):
            self._apply_incarnation(event)
        if isinstance(event, Progress):
            values.update(event.values, step=event.step, gate=event.open)
            if event.steps is not None:
                values["steps"] = event.steps
        elif isinstance(event, Published):
            values.update(version=event.version, checkpoint=event.checkpoint, learner=event.address)
        elif isinstance(event, Scored):
            values.update(examples_scored=event.examples, scored_per_second=event.per_second)
            if event.chunks:
                values["scored_version"] = max(version for *_, version in event.chunks)
        elif isinstance(event, Evaluated):
            values.update(validation_error=event.error, validation_loss=event.loss, evaluated=event.version)
        elif isinstance(event, Control):
            values["want"] = event.want
        elif isinstance(event, Fault):
            values.update(faults=values.get("faults", 0) + 1, fault=f"{event.what}: {event.detail}")
            if event.what.startswith(LEARNER):  # sent by the scheduler
                self.learner_waits = event.what == f"{LEARNER} waits"
        elif isinstance(event, Ended) and event.outcome not in SUCCEEDED:
            self.ended.setdefault(event.role, event)

    def _apply_incarnation(self, event: Event) -> None:
        ended = self.ended.get(LEARNER)
        if ended is not None and event.incarnation > ended.incarnation:
            del self.ended[LEARNER]  # not for an equal one: its last publication may arrive after its end
        if isinstance(event, Published) and event.incarnation != self.values.get("incarnation"):
            self.values["step"] = event.version
        if isinstance(event, Published | Progress):  # a heartbeat may come before the step that is resumed from
            self.values["incarnation"] = event.incarnation
        self._incarnation = event.incarnation
