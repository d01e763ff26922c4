"""The events that a long task announces on the topic of its run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dask_isgd import events
from dask_isgd.redaction import redact_urls
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.pubsub import Sender

_HEARTBEAT_EVERY = 1.0
_LONGEST = 400
"""Characters of a message: an event stays below a kilobyte."""


class Announcer:
    """Announces the events of one incarnation of a learner or coordinator.

    ``sender``: the task's worker, or what sends for a learner outside the cluster. Events are hints, so no method
    waits, and none raises once the worker has lost its scheduler.
    """

    def __init__(
        self,
        sender: Sender,
        run: str,
        role: str,
        attempt: int,
        incarnation: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.role, self.attempt, self.incarnation = run, role, attempt, incarnation
        self._sender, self._topic, self._clock = sender, events.topic_of(run), clock
        self._last_heartbeat = -math.inf

    @property
    def address(self) -> str:
        """The address of the task's worker; empty outside the cluster."""
        return self._sender.address

    # The learner ----------------------------------------------------------------------------

    def published(self, version: int, *, checkpoint: str | None, final: bool, holder: str | None = None) -> None:
        """Announce a version, its holder's address (None: the task's own), and the name of the latest checkpoint."""
        address = self.address if holder is None else holder
        self._announce(events.Published, version=version, address=address, checkpoint=checkpoint, final=final)

    def progress(
        self, step: int, steps: int | None, values: Mapping[str, float], *, gate_open: bool, probing: bool, why: str
    ) -> None:
        """Announce the latest row of the history, and the state of the gate."""
        self._announce(
            events.Progress,
            step=step,
            steps=steps,
            address=self.address,
            open=gate_open,
            probing=probing,
            why=why,
            values=dict(values),
        )

    def group(self, learners: Sequence[str], *, scorers: int, why: str) -> None:
        """Announce the addresses of all learners, and how many workers score that could learn, and why."""
        self._announce(events.Group, learners=list(learners), scorers=scorers, why=_shown(why))

    # The coordinator ------------------------------------------------------------------------

    def scored(self, chunks: Sequence[Sequence[int]], *, examples: int, per_second: float) -> None:
        """Announce rewritten chunks as (chunk, incarnation, version)."""
        self._announce(events.Scored, chunks=chunks, examples=examples, per_second=per_second)

    def evaluated(self, incarnation: int, version: int, *, loss: float, error: float) -> None:
        """Announce the evaluation of a version of the learner's ``incarnation``."""
        self._announce(events.Evaluated, incarnation=incarnation, version=version, loss=loss, error=error)

    def weight_summary(self, step: int, summary: Mapping[str, Any]) -> None:
        """Announce what all weights look like."""
        self._announce(events.WeightSummary, step=step, **summary)

    # Both -----------------------------------------------------------------------------------

    def fault(self, what: str, detail: str) -> None:
        """Announce that something was lost and is being recovered."""
        self._announce(events.Fault, what=what, detail=_shown(detail))

    def heartbeat(self) -> bool:
        """Announce a sign of life at most once per second. Return whether it was due."""
        now = self._clock()
        if now - self._last_heartbeat < _HEARTBEAT_EVERY:
            return False
        self._last_heartbeat = now
        self._announce(events.Heartbeat, role=self.role, address=self.address)
        return True

    def ended(self, outcome: str, step: int, message: str = "") -> None:
        """Announce how the task ended."""
        self._announce(
            events.Ended, attempt=self.attempt, role=self.role, outcome=outcome, step=step, message=_shown(message)
        )

    def _announce(self, kind: type[events.Event], **fields: Any) -> None:
        event = kind(**{"run": self.run, "incarnation": self.incarnation, **fields})
        pubsub.announce(self._sender, self._topic, event)


def _shown(text: str) -> str:
    return redact_urls(text)[:_LONGEST]
