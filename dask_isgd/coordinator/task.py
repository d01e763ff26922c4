"""The coordinator: one long, seceded Dask task that keeps the scorers busy with what matters.

It takes each published version from the run's Variable, keeps a bounded number of scoring tasks
in flight, newest version and stalest chunk first, writes the stamps, announces rewritten chunks,
and has the validation data evaluated. Its own loss costs the tasks in flight and no more.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
import uuid
from typing import Any

from dask.typing import Key
from distributed import Client, KilledWorker, Worker, get_client, get_worker, secede

from dask_isgd import config
from dask_isgd.coordinator.evaluation import Evaluator
from dask_isgd.coordinator.fair_share import FairShare
from dask_isgd.coordinator.in_flight import CompletedTask, InFlightTasks
from dask_isgd.coordinator.score_budget import may_start
from dask_isgd.coordinator.score_reporter import ScoreReporter
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import DataError, IsgdError, LeaseLostError, WorkersLostError
from dask_isgd.events import Control, Ended, Evaluated, Event, Fault, Heartbeat, Progress, Published
from dask_isgd.order import LatestVersion
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.dask_internals import task_status
from dask_isgd.runtime.parameters import Parameters, forget, newest
from dask_isgd.runtime.placement import ScorerPool
from dask_isgd.sampling import next_chunks, probe_chunks
from dask_isgd.scorer.task import ScoreReport, score

logger = logging.getLogger(__name__)

_ALIVE_EVERY = 1.0
_SILENCE = 5.0
_POLL = 0.05
_TRIES = 3


def coordinate(spec: RunSpec) -> dict[str, Any]:
    """Keep the weights of a run fresh until its learner has ended; how much was scored.

    Raises the error of a chunk that cannot be scored, unless the run goes on without it.
    """
    worker, client = get_worker(), get_client()
    key = worker.get_current_task()
    secede()
    return Coordinator(spec, worker, client, key).run()


class Coordinator:
    """One incarnation of a run's coordinator."""

    def __init__(self, spec: RunSpec, worker: Worker, client: Client, key: Key) -> None:
        self.spec, self.worker, self.client, self.key = spec, worker, client, key
        self.timeout = config.seconds("cluster.timeout")
        directory = spec.directory
        owner = {"key": str(key), "address": worker.address, "host": socket.gethostname(), "pid": os.getpid()}
        self.lease = directory.leases("coordinator").acquire(owner)
        self.incarnation = self.lease.incarnation
        self.events = pubsub.subscribe(client, spec.topic)
        self.bulletins = ScoreReporter(spec, self.incarnation, self._say, self.lease.check)
        self.scorers = ScorerPool(client, spec.scoring)
        self.neighbours = FairShare(client, worker, spec.run)
        self.flight = InFlightTasks(client, spec.scoring.timeout_seconds, self.events.wake)
        self.evaluations = Evaluator(spec, client, self.incarnation, self.events.wake)
        self.parameters: Parameters | None = None
        self.newest = LatestVersion(self.bulletins.newest)
        self.ended: Ended | None = None
        self.over: str | None = None
        """How an earlier start of this very task ended."""
        self.final = False
        self.paused = directory.control().get("want") == "pause"
        self.step = 0
        self.faults = 0
        self._tries: dict[int, int] = {}
        self._skipped: set[int] = set()
        self._probing: float | None = None
        """When the gate was found closed; None while scoring pays, or may."""
        self._probed = self._task_seconds = 0.0
        self._alive = 0.0
        self._heard = time.monotonic()
        self._published = False

    def run(self) -> dict[str, Any]:
        outcome, message = "failed", ""
        try:
            outcome = self._until_the_end()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._close(outcome, message)
        return {"outcome": outcome, "examples": self.bulletins.examples, "faults": self.faults}

    def _until_the_end(self) -> str:
        try:
            while not self._done():
                if (now := task_status(self.worker, self.key)) != "wanted":
                    return "left" if now == "leaving" else "stopped"
                self._turn()
        except LeaseLostError:
            return "fenced"
        except (OSError, TimeoutError, RuntimeError):
            # whatever breaks while the cluster goes away is its way of going away
            if (now := task_status(self.worker, self.key)) == "wanted":
                raise
            return "left" if now == "leaving" else "stopped"
        return self.over or (self.ended.outcome if self.ended is not None else "finished")

    def _done(self) -> bool:
        if self.over is not None:
            return True
        if self.ended is None:
            return False
        return self.ended.outcome != "finished" or (self.final and not self.evaluations.busy)

    def _turn(self) -> None:
        event = self.events.get(_POLL)
        if event is not None:
            self._take(event)
        for event in self.events.drain():
            self._take(event)
        if self._published and self.over is None:
            self._published = False
            self._take_newest()
        if time.monotonic() - self._heard > _SILENCE:
            self._heard = time.monotonic()
            self.events.catch_up()
        for landed in self.flight.landed():
            self._land(landed)
        for what in self.evaluations.land():
            self._say(
                Evaluated(
                    run=self.spec.run,
                    incarnation=what.incarnation,
                    version=what.version,
                    loss=what.loss,
                    error=what.error,
                )
            )
        self._submit()
        self._report()

    # Events ---------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        if isinstance(event, Published | Progress):
            self._heard = time.monotonic()
        if isinstance(event, Published):
            self.scorers.learner = event.address
            if self.ended is not None and event.incarnation > self.ended.incarnation:
                self.ended = None  # it has a successor; its own last publication may be heard after its end
            # gone with its holder: to ask for it would be an error in the scheduler's log
            self._published = self.scorers.knows(event.address)
            self.final = self.final or event.final
        elif isinstance(event, Progress):
            self.scorers.learner, self.step = event.address, event.step
            if event.probing != (self._probing is not None):
                self._probing, self._probed = (time.monotonic() if event.probing else None), 0.0
        elif isinstance(event, Control):
            self.paused = event.want == "pause" and event.attempt == self.spec.attempt
        elif isinstance(event, Ended) and event.role == "coordinator" and event.attempt == self.spec.attempt:
            # Dask runs a task again when the worker that holds its result dies: this one was over
            self.over = event.outcome if event.outcome in ("finished", "stopped") else None
        elif isinstance(event, Ended) and event.role == "learner" and event.attempt == self.spec.attempt:
            self.ended = event if event.outcome not in ("left", "fenced") else None

    def _take_newest(self) -> None:
        """Take the newest version; an older incarnation is not heard after a younger one."""
        found = newest(self.client, self.spec.variable, self.timeout)
        if found is not None and self.newest.accepts(found.order):
            self.parameters = found
            self.evaluations.offer(found, self.scorers.placement())

    # Scoring --------------------------------------------------------------------------------

    def _submit(self) -> None:
        if self.parameters is None or self.paused or self.spec.sampling.uniform or self.ended is not None:
            return
        room = self._room()
        if room <= 0:
            return
        incarnation, version = self.parameters.order
        orders = self.bulletins.orders
        taken = set(self.flight.chunks) | self._skipped
        probe = probe_chunks(self.spec.n_chunks) if self._probing is not None else None
        found = next_chunks(orders, taken, room, among=probe)
        # the stalest first: behind one that is as fresh as can be all are
        chunks = list(itertools.takewhile(lambda chunk: not orders[chunk] >= incarnation * 1e12 + version, found))
        if not chunks:
            return
        futures = self.client.map(  # one graph: each costs the scheduler and this worker a millisecond
            score,
            *zip(*((self.parameters.future, self.spec, chunk, incarnation, version) for chunk in chunks), strict=True),
            key=[(f"score-{self.spec.run}", c, incarnation, version, uuid.uuid4().hex[:8]) for c in chunks],
            pure=False,
            **self.scorers.placement(),
        )
        for chunk, future in zip(chunks, futures, strict=True):
            self.flight.launch(chunk, future, self.parameters.order)

    def _room(self) -> int:
        """Scoring tasks to submit now: what scorers can hold, or a probe while the gate is closed."""
        share = self.neighbours.share(self.scorers.room())
        if self._probing is None:
            return share - len(self.flight)
        return may_start(
            share // self.spec.scoring.in_flight,
            len(self.flight),
            probing=True,
            busy_seconds=self._probed,
            elapsed_seconds=time.monotonic() - self._probing,
            task_seconds=self._task_seconds,
        )

    def _land(self, landed: CompletedTask) -> None:
        report = landed.result
        if isinstance(report, ScoreReport):
            self._tries.pop(report.chunk, None)
            self.bulletins.scored(report)
            self._task_seconds = report.seconds
            self._probed += report.seconds
            if report.bad:
                self._fault("norms", f"chunk {report.chunk}: {report.bad} bad norms kept their former weight")
            return
        if isinstance(report, LeaseLostError):
            return  # a straggler of a synchronous run: the chunk is scored again for the successor
        self.faults += 1
        self._fault("score", f"chunk {landed.chunk}: {type(report).__name__}: {report}"[:400])
        if landed.lost:
            if self.parameters is not None and self.parameters.future.status != "finished":
                self.parameters = None  # lost with its holder: the next version is waited for
            return
        tries = self._tries[landed.chunk] = self._tries.get(landed.chunk, 0) + 1
        if isinstance(report, DataError) and self.spec.scoring.skip_bad_chunks:
            self._skipped.add(landed.chunk)
        elif isinstance(report, DataError) or tries >= _TRIES:
            raise _named(report, landed.chunk)

    # Reporter --------------------------------------------------------------------------------

    def _report(self) -> None:
        self.bulletins.tell(self.step, complete=self.spec.learning.synchronous and len(self.flight) == 0)
        now = time.monotonic()
        if now - self._alive >= _ALIVE_EVERY:
            self._alive = now
            self._say(
                Heartbeat(
                    run=self.spec.run,
                    incarnation=self.incarnation,
                    role="coordinator",
                    address=self.worker.address,
                )
            )

    def _fault(self, what: str, detail: str) -> None:
        logger.warning("run %s: %s: %s", self.spec.run, what, detail)
        self._say(Fault(run=self.spec.run, incarnation=self.incarnation, what=what, detail=detail))

    def _say(self, event: Event) -> None:
        pubsub.announce(self.worker, self.spec.topic, event)

    def _close(self, outcome: str, message: str) -> None:
        try:
            self.flight.cancel()
            self.evaluations.close()
            self.bulletins.close(self.step)
            self.parameters = None
            if outcome not in ("left", "fenced") and self.over is None:  # else a successor wants it
                forget(self.client, self.spec.variable)
        except (OSError, RuntimeError, IsgdError):
            logger.exception("closing the coordinator of run %s", self.spec.run)
        finally:
            self._say(
                Ended(
                    run=self.spec.run,
                    incarnation=self.incarnation,
                    attempt=self.spec.attempt,
                    role="coordinator",
                    outcome=outcome,
                    step=max(0, self.newest.order[1]),
                    message=message[:400],
                )
            )
            self.events.close()
            self.neighbours.close()


def _named(error: Exception, chunk: int) -> Exception:
    if not isinstance(error, KilledWorker):
        return error
    return WorkersLostError(
        f"chunk {chunk}: every worker that tried to score it died ({error}). "
        "Look at their logs; is there memory enough for Scoring.batch_size examples?"
    )
