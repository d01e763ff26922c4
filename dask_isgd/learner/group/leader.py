"""Rank 0's care for its group: it takes the places, starts the other ranks, and finds out why the group was lost."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from distributed import Client, Future, Worker
from distributed.comm.addressing import get_address_host
from distributed.scheduler import KilledWorker, NoValidWorkerError

from dask_isgd import config
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import ConfigError, NoLearnerWorkerError, NonFiniteLossError
from dask_isgd.learner.gradient_sum import GroupLostError
from dask_isgd.learner.group import meeting
from dask_isgd.learner.group.follower import GO, HERE, OPENING, READY, ROSTER, follow
from dask_isgd.learner.group.roles import Measured, Roles
from dask_isgd.runtime.placement import LEARNER, can_score, learner_places, too_few_places, workers_of

logger = logging.getLogger(__name__)

_PATIENCE = 6.0
"""Seconds in which a worker that died may return before the group continues without it."""
_VERDICT = 5.0
"""Seconds in which the scheduler notices that a worker died, or receives the error of a task."""
_POLL = 0.1


@dataclass
class Experience:
    """What one incarnation of a group leaves to the next one, in the same task."""

    places: int = 0
    """Places of the latest incarnation, of ranks and of workers that score instead; 0: there was none."""
    avoided: set[str] = field(default_factory=set)
    """Addresses of workers whose rank did not come or left; they score, if they can."""
    roles: Roles = field(default_factory=Roles)
    scorers: int = 0
    """How many workers are to score that could learn."""
    why: str = ""
    """The reason for it."""
    worth: float = math.nan
    """The latest ``Choice.worth``."""


class Leader:
    """The places of a group, whose rank 0 runs on ``worker``.

    At the first start of a run there have to be as many places as it wants; an ``elastic`` group makes do with
    ``min_learners``. ``tick`` is called now and then while something is waited for, and raises if it is not to be.
    """

    def __init__(
        self,
        spec: RunSpec,
        worker: Worker,
        client: Client,
        incarnation: int,
        experience: Experience,
        *,
        elastic: bool,
        tick: Callable[[], object],
    ) -> None:
        self._spec, self._worker, self._client, self._incarnation = spec, worker, client, incarnation
        self._experience, self._elastic, self._tick = experience, elastic or experience.places > 0, tick
        self._timeout = config.seconds("cluster.timeout")
        self._host = get_address_host(worker.address)
        self._store: Any = None
        """Where the ranks meet; it ends when nobody holds it."""
        self._futures: dict[str, Future[Any]] = {}
        """The other ranks by address, in their order."""

    @property
    def count(self) -> int:
        """Ranks of the group, this one included."""
        return len(self._futures) + 1

    @property
    def addresses(self) -> list[str]:
        """The worker of each rank."""
        return [self._worker.address, *self._futures]

    def open(self) -> None:
        """Start a rank on every place, and keep those that come. Raises NoLearnerWorkerError if they are too few."""
        if self._worker.address.startswith("inproc"):
            raise ConfigError(
                "Learning.learners: got workers that are threads of one process, wanted processes: each has one rank"
            )
        places = self._await_places()
        try:
            if places:
                self._call(places)
            self._require(self.count)
        except BaseException:
            self.close()
            raise
        self._experience.places = max(self._experience.places, self.count + self._experience.scorers)

    def _wanted(self, there: int) -> int:
        """Return how many ranks the group is to have, if there are so many places."""
        return max(self._able(there) - self._experience.scorers, self._spec.learning.min_learners)

    def _able(self, there: int) -> int:
        """Return how many ranks the group would have if all of its workers learned."""
        learners, most = self._spec.learning.learners, self._spec.learning.batch_size
        return min(most, max(there, self._experience.places) if learners == "all" else learners)

    def _require(self, there: int) -> None:
        learning = self._spec.learning
        least = learning.min_learners if self._elastic or learning.learners == "all" else self._wanted(there)
        if there < least:
            raise NoLearnerWorkerError(too_few_places(learning.learners, there))

    def _places(self) -> list[str]:
        """Return the workers for other ranks; those that could score come last."""
        taken = {self._worker.address, *self._experience.avoided, *self._busy()}
        workers = workers_of(self._client)
        places = [address for address in learner_places(workers) if address not in taken]
        return sorted(places, key=lambda address: can_score(workers[address], self._spec.scoring))

    def _busy(self) -> set[str]:
        """Return the workers on which other runs learn."""
        own = f"-{self._spec.run}"
        return {
            address
            for address, keys in self._client.processing().items()
            for key in keys
            if isinstance(key, tuple) and str(key[0]).startswith(("learn-", "follow-")) and not key[0].endswith(own)
        }

    def _await_places(self) -> list[str]:
        """Return the addresses of the other ranks, as soon as there are enough of them."""
        began = time.monotonic()
        while True:
            places = self._places()
            wanted, waited = self._wanted(len(places) + 1), time.monotonic() - began
            enough = self._elastic and len(places) + 1 >= self._spec.learning.min_learners
            if len(places) + 1 >= wanted or waited > (_PATIENCE if enough else self._timeout):
                return places[: wanted - 1]
            self._wait()

    def _wait(self) -> None:
        self._tick()
        time.sleep(_POLL)

    def _call(self, places: list[str]) -> None:
        called, self._store = meeting.call_meeting(self._host, self._timeout)
        for member, address in enumerate(places):
            self._futures[address] = self._client.submit(
                follow,
                self._spec,
                called,
                member,
                key=(f"follow-{self._spec.run}", self._spec.attempt, self._incarnation, member),
                pure=False,
                priority=10,
                workers=[address],  # and no other one: a rank whose worker died is not started again
                resources={LEARNER: 1},
            )
        deadline = time.monotonic() + self._timeout
        missing = dict(enumerate(places))
        while missing and time.monotonic() < deadline:
            self._raise_errors()
            missing = {m: address for m, address in missing.items() if not self._store.check([HERE.format(m)])}
            self._wait()
        self._store.set(ROSTER, json.dumps([member for member in range(len(places)) if member not in missing]))
        for address in missing.values():
            self._experience.avoided.add(address)
            self._client.cancel([self._futures.pop(address)])

    def form(self, device: torch.device) -> None:
        """Make the process group, once all ranks have opened their data. Raises GroupLostError."""
        deadline = time.monotonic() + OPENING * self._timeout
        while self._store.add(READY, 0) < self.count - 1:
            self._raise_errors()
            ended = any(future.status != "pending" for future in self._futures.values())
            if time.monotonic() > deadline or ended or self._gone():
                raise GroupLostError("a rank did not open its data")
            self._wait()
        self._store.set(GO, "")
        meeting.form(self._store, 0, self.count, device, self._host, self._timeout)

    def _gone(self) -> set[str]:
        return self._futures.keys() - workers_of(self._client).keys()

    def may_grow(self) -> bool:
        """Whether there are places for more ranks than the group has."""
        places = self._places()
        return min(self._wanted(len(places) + 1), len(places) + 1) > self.count

    def judge(self, now: Measured | None, *, at: float, ideal_gain: float, pays: bool) -> str:
        """Choose how many workers are to score that could learn; return why this changes, "" if it doesn't."""
        workers, places = workers_of(self._client), self._places()
        able = min(self._able(len(places) + 1), len(places) + 1)
        free = sum(can_score(workers[address], self._spec.scoring) for address in places if address in workers)
        most = max(0, min(able - self._spec.learning.min_learners, free))
        scorers = max(0, able - self.count)
        choice = self._experience.roles.judge(able, scorers, most, now, at=at, ideal_gain=ideal_gain, pays=pays)
        self._experience.scorers, self._experience.worth = choice.scorers, choice.worth
        if choice.scorers == scorers:
            return ""
        self._experience.why = choice.reason
        return choice.reason

    # The end --------------------------------------------------------------------------------

    def explain(self) -> str:
        """Return which workers were lost, as far as is known. Raises the error of a rank that failed.

        A rank that ends without having been asked has lost another one; one that does not end, hangs.
        """
        meeting.dissolve()  # some may wait for this rank only
        deadline = time.monotonic() + _VERDICT
        while True:
            self._raise_errors()
            gone = self._gone()
            running = {a for a, future in self._futures.items() if future.status == "pending"} - gone
            if not running or time.monotonic() > deadline:
                break
            time.sleep(_POLL)
        left = {a for a, f in self._futures.items() if f.status == "finished" and self._result(f) == "left"}
        self._experience.avoided |= running | left
        return ", ".join(sorted(gone | running | left)) or "none that is known"

    def _result(self, future: Future[Any]) -> str:
        try:
            return str(future.result(timeout=self._timeout))
        except Exception:  # its worker has died since
            return "left"

    def _raise_errors(self) -> None:
        for future in self._futures.values():
            if future.status == "error":
                error = future.exception(timeout=self._timeout)
                if isinstance(error, KilledWorker | NoValidWorkerError):
                    continue  # of a worker that is gone, which is no error of the rank
                assert error is not None
                raise error

    def telling(self, own: NonFiniteLossError) -> NonFiniteLossError:
        """Return the error of the rank whose examples had the loss, instead of this rank's ``own``."""
        deadline = time.monotonic() + _VERDICT
        while not own.indices and time.monotonic() < deadline:
            for future in [future for future in self._futures.values() if future.status == "error"]:
                error = future.exception(timeout=self._timeout)
                if isinstance(error, NonFiniteLossError) and error.indices:
                    return error
            if all(future.status != "pending" for future in self._futures.values()):
                break
            time.sleep(_POLL)
        return own

    def close(self) -> None:
        """Leave the process group, and let the other ranks end."""
        meeting.dissolve()
        self._store = None
        self._client.cancel(list(self._futures.values()))
        self._futures = {}
