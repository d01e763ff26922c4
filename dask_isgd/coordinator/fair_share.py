"""Runs that train on one cluster at the same time share its scorers in equal parts.

Every coordinator claims its share once per second on a topic that all coordinators receive. There is no
central allocator, so the end of one run does not stop the others: a run that stops claiming is left out,
and its share goes to the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Self

from distributed import Client, Worker

from dask_isgd.events import ShareClaim
from dask_isgd.runtime import pubsub

TOPIC = "isgd scorers"
_CLAIM_EVERY = 1.0
_EXPIRES_AFTER = 5.0


def part(room: int, run: str, runs: Collection[str]) -> int:
    """Return how many of ``room`` tasks in flight ``run`` may have: equal parts, the remainder to the first by name.

    At least one: a cluster with more runs than places serves them in turn.

    >>> [part(8, run, {"a", "b", "c"}) for run in "abc"]
    [3, 3, 2]
    """
    names = sorted({run, *runs})
    whole, left = divmod(room, len(names))
    return max(min(room, 1), whole + (names.index(run) < left))


class Claims:
    """The runs that claimed a share less than five seconds ago."""

    def __init__(self) -> None:
        self._received: dict[str, float] = {}

    def add(self, run: str, now: float) -> None:
        """Add a claim that was received at time ``now``."""
        self._received[run] = now

    def runs(self, now: float) -> set[str]:
        """Return the runs whose claim has not expired at time ``now``."""
        self._received = {run: at for run, at in self._received.items() if now - at < _EXPIRES_AFTER}
        return set(self._received)


class FairShare:
    """One coordinator's share of the scorers."""

    def __init__(self, client: Client, worker: Worker, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._worker, self._run, self._clock = client, worker, run, clock
        self._events: pubsub.Subscription | None = None
        self._claims = Claims()
        self._last_claim = -math.inf

    def open(self) -> Self:
        """Subscribe to the claims of all runs."""
        self._events = pubsub.subscribe(self._client, TOPIC)
        return self

    def share(self, room: int) -> int:
        """Claim a share, and return this run's part of the ``room``."""
        assert self._events is not None, "open() comes first"
        now = self._clock()
        for event in self._events.drain():
            if isinstance(event, ShareClaim):
                self._claims.add(event.run, now)
        if now - self._last_claim >= _CLAIM_EVERY:
            self._last_claim = now
            pubsub.announce(self._worker, TOPIC, ShareClaim(run=self._run, incarnation=0))
        return part(room, self._run, self._claims.runs(now))

    def close(self) -> None:
        """Unsubscribe."""
        if self._events is not None:
            self._events.close()
