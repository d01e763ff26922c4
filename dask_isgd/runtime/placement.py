"""Which worker does what: by declared resources, otherwise by address."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from distributed import Client

from dask_isgd.config import Scoring

LEARNER, SCORER = "learner", "scorer"
_REFRESH_SECONDS = 1.0
_SHARE = 0.25
"""Part of the resources of a place that a scoring task asks for: beside the task that is scored, another one reads and
others write (``scorer/scoring_threads.py``). A power of two, so that Dask's sums of it are exact."""


def places(threads: int, supply: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """Return how many chunks a worker scores at a time, at least one: one per thread, as far as its resources allow.

    >>> places(4, {"scorer": 2}, {"scorer": 1})
    2
    """
    return max(1, min([threads, *(int(supply[name] // amount) for name, amount in wanted.items())]))


def workers_of(client: Client) -> dict[str, Mapping[str, Any]]:
    """Return the cluster's workers by address: threads, resources, memory limit."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def _declares(worker: Mapping[str, Any], name: str) -> bool:
    return bool((worker.get("resources") or {}).get(name, 0) > 0)


def lacks_learner(workers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether workers declare their roles by resources, and none of them declares the learner's."""
    roles = {name for name in (LEARNER, SCORER) for worker in workers.values() if _declares(worker, name)}
    return roles == {SCORER}


def note_on_sharing(workers: Mapping[str, Mapping[str, Any]], *, feedback: bool) -> str | None:
    """Describe what a cluster of one worker means for scoring, with ``feedback`` or without; None if there are more.

    >>> note_on_sharing({"tcp://a": {"nthreads": 2}}, feedback=False)
    'scoring shares it with the learner'
    """
    if len(workers) != 1:
        return None
    (worker,) = workers.values()
    alone = int(worker["nthreads"]) == 1
    note = "nothing is scored" if alone or feedback else "scoring shares it with the learner"
    if feedback:
        note += ", and weights come from the learner's minibatches"
    if alone:
        note += "; its only thread is the learner's, so nothing is evaluated before the end: start it with --nthreads 2"
    return note


def missing_resources(workers: Mapping[str, Mapping[str, Any]], scoring: Scoring) -> str | None:
    """Describe the resources that scoring tasks require if no worker declares all of them; None if one does."""
    wanted = dict(scoring.resources or {})
    offered = [dict(worker.get("resources") or {}) for worker in workers.values()]
    if not wanted or any(all(each.get(name, 0) >= n for name, n in wanted.items()) for each in offered):
        return None
    declared = sorted({f"{name}={n:g}" for each in offered for name, n in each.items()})
    return f"got {wanted}, wanted what a worker declares, and the workers declare {', '.join(declared) or 'nothing'}"


def learner_places(workers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the addresses of the workers that declare the learner's resource, in an order that is the same to all."""
    return sorted(address for address, worker in workers.items() if _declares(worker, LEARNER))


def can_score(worker: Mapping[str, Any], scoring: Scoring) -> bool:
    """Whether a worker of a cluster with roles declares what scoring tasks ask for."""
    return all(_declares(worker, name) for name in scoring.resources or {SCORER: 1})


def too_few_places(wanted: object, places: int) -> str:
    """Return the message of the error that there are only so many places for ``wanted`` learners."""
    return (
        f"Learning.learners: got {wanted}, wanted at most {places}: so many workers declare the resource {LEARNER!r} "
        "and are free. Start others with `dask worker SCHEDULER --resources 'learner=1' --nthreads 2`, or use "
        "LocalCluster(learners=…)"
    )


def learner_placement(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arguments of ``Client.submit`` for the learner: by resource if declared, else a preferred address.

    With a strict address the task would wait indefinitely once that worker has restarted under another one.
    """
    if any(_declares(w, LEARNER) for w in workers.values()):
        return {"resources": {LEARNER: 1}}
    free = [a for a, w in workers.items() if not _declares(w, SCORER)] or list(workers)
    chosen = min(free, key=lambda a: (-int(workers[a]["nthreads"]), str(workers[a].get("name")), a))
    return {"workers": [chosen], "allow_other_workers": True}


def coordinator_placement(workers: Mapping[str, Mapping[str, Any]], learner: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``Client.submit`` for the coordinator: away from the learner's worker if possible."""
    taken = set(learner.get("workers", [a for a, w in workers.items() if _declares(w, LEARNER)]))
    others = [address for address in workers if address not in taken]
    return {"workers": others, "allow_other_workers": True} if others else {}


class ScorerPool:
    """The workers that score: how many tasks they can hold, and how to submit one.

    ``alone``: whether the learner's worker scores if there is no other. ``together``: whether the run has several
    learners; scoring tasks avoid them all, and until they are known every worker that declares the resource.
    """

    def __init__(self, client: Client, scoring: Scoring, *, alone: bool = True, together: bool = False) -> None:
        self._client, self._scoring, self._alone, self._together = client, scoring, alone, together
        self.learner: str | None = None
        """Address of the learner's worker, which scoring tasks avoid if they can."""
        self.learners: set[str] | None = None
        """Addresses of all learners' workers, where there are several; None while they are not known."""
        self._workers: dict[str, Mapping[str, Any]] = {}
        self._refreshed = 0.0

    def _refresh(self) -> None:
        if time.monotonic() - self._refreshed >= _REFRESH_SECONDS:
            self._workers = workers_of(self._client)
            self._refreshed = time.monotonic()

    def _resources(self) -> dict[str, float]:
        if self._scoring.resources is not None:
            return dict(self._scoring.resources)
        return {SCORER: 1} if any(_declares(w, SCORER) for w in self._workers.values()) else {}

    def has_worker(self, address: str) -> bool:
        """Whether a worker with this address is on the cluster now."""
        if address not in self._workers:
            self._refreshed = 0.0
        self._refresh()
        return address in self._workers

    def addresses(self) -> list[str]:
        """Return the workers that score: those with the resources, without the learner's unless there is no other."""
        able = self._able()
        return [a for a in able if not self._learns(a)] or able

    def _able(self) -> list[str]:
        self._refresh()
        wanted = self._resources()
        return [a for a, w in self._workers.items() if all(_declares(w, name) for name in wanted)]

    def _learns(self, address: str) -> bool:
        if address == self.learner or not self._together:
            return address == self.learner
        return _declares(self._workers[address], LEARNER) if self.learners is None else address in self.learners

    def placement(self) -> dict[str, Any]:
        """Return the arguments of ``Client.submit`` for a scoring task."""
        addresses = self.addresses()
        resources = self._resources()
        if resources:
            shares = {"resources": {name: amount * _SHARE for name, amount in resources.items()}}
            apart = self._together and len(addresses) < len(self._able())
            return {**shares, "workers": addresses, "allow_other_workers": True} if apart else shares
        # preferred only: a worker that restarts gets another address
        return {"workers": addresses, "allow_other_workers": True} if addresses else {}

    def capacity(self) -> int:
        """Return how many scoring tasks may be in flight: ``in_flight`` per place of each scorer."""
        addresses, slots = self.addresses(), 0  # first: it refreshes the workers, which decide on the resources
        if not self._alone and all(map(self._learns, addresses)):
            return 0
        wanted = self._resources()
        for address in addresses:
            worker = self._workers[address]
            slots += places(int(worker["nthreads"]), worker.get("resources") or {}, wanted)
        return slots * self._scoring.in_flight
