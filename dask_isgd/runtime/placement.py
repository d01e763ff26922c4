"""Which worker does what: by declared resources, else by address."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from distributed import Client

from dask_isgd.config import Scoring

LEARNER, SCORER = "learner", "scorer"
_LOOK_EVERY = 1.0


def workers_of(client: Client) -> dict[str, Mapping[str, Any]]:
    """The cluster's workers by address: threads, resources, memory limit."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def _declares(worker: Mapping[str, Any], name: str) -> bool:
    return bool((worker.get("resources") or {}).get(name, 0) > 0)


def lacks_learner(workers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the roles are told by resources, and no worker declares the learner's."""
    roles = {name for name in (LEARNER, SCORER) for worker in workers.values() if _declares(worker, name)}
    return roles == {SCORER}


def lacks_resources(workers: Mapping[str, Mapping[str, Any]], scoring: Scoring) -> str | None:
    """What no worker has of the resources that scoring tasks ask for, as a sentence; None if one has it all."""
    wanted = dict(scoring.resources or {})
    offered = [dict(worker.get("resources") or {}) for worker in workers.values()]
    if not wanted or any(all(each.get(name, 0) >= n for name, n in wanted.items()) for each in offered):
        return None
    declared = sorted({f"{name}={n:g}" for each in offered for name, n in each.items()})
    return f"got {wanted}, wanted what a worker declares, and the workers declare {', '.join(declared) or 'nothing'}"


def for_learner(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How to submit the learner: by resource where one is declared, else softly by address.

    A hard address would wait for ever once that worker has been restarted elsewhere.
    """
    if any(_declares(w, LEARNER) for w in workers.values()):
        return {"resources": {LEARNER: 1}}
    free = [a for a, w in workers.items() if not _declares(w, SCORER)] or list(workers)
    chosen = min(free, key=lambda a: (-int(workers[a]["nthreads"]), str(workers[a].get("name")), a))
    return {"workers": [chosen], "allow_other_workers": True}


def for_coordinator(workers: Mapping[str, Mapping[str, Any]], learner: Mapping[str, Any]) -> dict[str, Any]:
    """How to submit the coordinator: off the learner's worker where there is another."""
    taken = set(learner.get("workers", [a for a, w in workers.items() if _declares(w, LEARNER)]))
    others = [address for address in workers if address not in taken]
    return {"workers": others, "allow_other_workers": True} if others else {}


class ScorerPool:
    """The workers that score: how many tasks they can hold, and how to submit one."""

    def __init__(self, client: Client, scoring: Scoring) -> None:
        self._client, self._scoring = client, scoring
        self.learner: str | None = None
        """Where the learner reports to run; scorers keep off it if they can."""
        self._workers: dict[str, Mapping[str, Any]] = {}
        self._looked = 0.0

    def _look(self) -> None:
        if time.monotonic() - self._looked >= _LOOK_EVERY:
            self._workers = workers_of(self._client)
            self._looked = time.monotonic()

    def _resources(self) -> dict[str, float]:
        if self._scoring.resources is not None:
            return dict(self._scoring.resources)
        return {SCORER: 1} if any(_declares(w, SCORER) for w in self._workers.values()) else {}

    def knows(self, address: str) -> bool:
        """Whether a worker of this address is there now."""
        if address not in self._workers:
            self._looked = 0.0
        self._look()
        return address in self._workers

    def addresses(self) -> list[str]:
        """Workers that score: those with the resource, else all but the learner's, else its own."""
        self._look()
        wanted = self._resources()
        able = [a for a, w in self._workers.items() if all(_declares(w, name) for name in wanted)]
        return [a for a in able if a != self.learner] or able

    def placement(self) -> dict[str, Any]:
        """Keyword arguments of ``Client.submit``."""
        addresses = self.addresses()
        resources = self._resources()
        if resources:
            return {"resources": resources}
        # softly: a worker that is restarted comes back under another address
        return {"workers": addresses, "allow_other_workers": True} if addresses else {}

    def room(self) -> int:
        """Scoring tasks that may be in flight: ``in_flight`` for each place of each scorer."""
        addresses, places = self.addresses(), 0  # first: it looks, and what is asked for follows what is there
        wanted = self._resources()
        for address in addresses:
            worker = self._workers[address]
            threads = int(worker["nthreads"])
            shared = [int((worker.get("resources") or {})[name] // amount) for name, amount in wanted.items()]
            places += max(1, min([threads, *shared]))
        return places * self._scoring.in_flight
