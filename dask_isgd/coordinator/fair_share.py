"""Runs that train on one cluster at once share its scorers: each takes its part and no more.

Every coordinator says once a second on a topic of its own that it would score, and hears the others
say so. Nobody decides for all, so nobody's end stops the rest: who falls silent is left out, and
its part falls to the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from distributed import Client, Worker

from dask_isgd.events import ShareClaim
from dask_isgd.runtime import pubsub

TOPIC = "isgd scorers"
_SAY_EVERY = 1.0
_SILENT = 5.0


def part(room: int, run: str, runs: Collection[str]) -> int:
    """How many of ``room`` tasks in flight are ``run``'s: equal parts, what is left over to the first by name.

    At least one: a cluster with more runs than places serves them in turn.

    >>> [part(8, run, {"a", "b", "c"}) for run in "abc"]
    [3, 3, 2]
    """
    everyone = sorted({run, *runs})
    whole, left = divmod(room, len(everyone))
    return max(min(room, 1), whole + (everyone.index(run) < left))


class FairShare:
    """What one coordinator knows of the others."""

    def __init__(self, client: Client, worker: Worker, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker, self._run, self._clock = worker, run, clock
        self._events = pubsub.subscribe(client, TOPIC)
        self._heard: dict[str, float] = {}
        self._said = -_SAY_EVERY

    def share(self, room: int) -> int:
        """This run's part of the ``room``; the others hear that it wants one."""
        now = self._clock()
        for event in self._events.drain():
            if isinstance(event, ShareClaim):
                self._heard[event.run] = now
        if now - self._said >= _SAY_EVERY:
            self._said = now
            pubsub.announce(self._worker, TOPIC, ShareClaim(run=self._run, incarnation=0))
        self._heard = {run: when for run, when in self._heard.items() if now - when < _SILENT}
        return part(room, self._run, self._heard)

    def close(self) -> None:
        self._events.close()
