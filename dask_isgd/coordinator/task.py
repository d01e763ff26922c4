"""The coordinator: one long, seceded Dask task that keeps the scorers busy with what matters.

It fetches each published version from the run's Variable, keeps a bounded number of scoring tasks
in flight, latest version and stalest chunk first, writes the stamps, announces rewritten chunks,
and has the validation data evaluated. Losing it costs the tasks in flight and nothing more.
"""

from __future__ import annotations

import contextlib
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
from dask_isgd.errors import DataError, IsgdError, LeaseLostError, RunNotFoundError, WorkersLostError
from dask_isgd.events import Control, Ended, Event, Group, Progress, Published
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.order import LatestVersion, sort_key
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.announcer import Announcer
from dask_isgd.runtime.dask_internals import calm, unmetered
from dask_isgd.runtime.long_task import LongTask, Parts
from dask_isgd.runtime.parameters import Parameters, forget, newest
from dask_isgd.runtime.placement import ScorerPool
from dask_isgd.sampling import next_chunks
from dask_isgd.scorer.task import ScoreReport, score

logger = logging.getLogger(__name__)

_CATCH_UP_AFTER = 5.0
_POLL = 0.05
_TRIES = 3


@unmetered
def coordinate(spec: RunSpec) -> dict[str, Any]:
    """Keep the weights of a run fresh until its learner has ended; return how much was scored.

    Raises the error of a chunk that cannot be scored, unless the run is configured to skip it.
    """
    worker, client = get_worker(), get_client()
    key = worker.get_current_task()
    calm(worker)
    secede()
    coordinator = Coordinator(spec, worker, client, key)
    return coordinator.result(coordinator.run_or_reschedule())


class Coordinator(LongTask):
    """One incarnation of a run's coordinator."""

    def __init__(self, spec: RunSpec, worker: Worker, client: Client, key: Key) -> None:
        super().__init__(worker, client, key)
        self.spec = spec
        self.timeout = config.seconds("cluster.timeout")
        self.parameters: Parameters | None = None
        """The latest version, which is being scored."""
        self.learner_ended: Ended | None = None
        self.earlier_outcome: str | None = None
        """How an earlier start of this very task ended."""
        self.superseded = False
        """Whether the run has been started again."""
        self.final_published = False
        self.paused = False
        self.learner_step = 0
        self.faults = self.examples = 0
        self._tries: dict[int, int] = {}
        self._skipped: set[int] = set()
        self._probing_since: float | None = None
        """When the gate was found closed; None while scoring pays, or may pay."""
        self._probe_seconds = self._task_seconds = 0.0
        self._last_received = time.monotonic()
        self._must_fetch = False

    def is_superseded(self) -> bool:
        return self.spec.directory.attempt() > self.spec.attempt

    def open(self, parts: Parts) -> None:
        spec, client = self.spec, self.client
        owner = {"key": str(self.key), "address": self.worker.address, "host": socket.gethostname(), "pid": os.getpid()}
        self.lease = spec.directory.acquire_lease("coordinator", owner)
        self.announcer = Announcer(self.worker, spec.run, "coordinator", spec.attempt, self.lease.incarnation)
        self.events = parts.add(pubsub.subscribe(client, spec.topic))
        interval = config.seconds("cluster.topic-interval")
        self.score_reporter = ScoreReporter(spec.directory.open_weights(), self.announcer, self.lease, interval)
        together = spec.learning.learners != 1
        self.scorers = ScorerPool(client, spec.scoring, alone=not spec.feedback_suffices, together=together)
        self.fair_share = parts.open(FairShare(client, self.worker, spec.run))
        self.tasks = InFlightTasks(client, spec.scoring.timeout_seconds, self.events.wake)
        evaluations = InFlightTasks(client, spec.scoring.timeout_seconds, self.events.wake)
        self.evaluator = Evaluator(spec, client, self.lease.incarnation, evaluations)
        self.latest_version = LatestVersion(self.score_reporter.latest)
        with contextlib.suppress(RunNotFoundError):  # a damaged file asks for nothing
            self.paused = spec.directory.control()["want"] == "pause"
        self._control_reader = parts.open(LatestJobWorker("control", self.timeout))

    def result(self, outcome: str) -> dict[str, Any]:
        """Return the result of the task."""
        return {"outcome": outcome, "examples": self.examples, "faults": self.faults}

    @property
    def last_step(self) -> int:
        return max(0, self.latest_version.order[1])

    def work(self) -> str:
        while not self._is_over:
            if self.superseded or self.status != "wanted":
                return self.leave()
            self._work_once()
        return self.earlier_outcome or (self.learner_ended.outcome if self.learner_ended is not None else "finished")

    def leave(self) -> str:
        if self.superseded:
            return "superseded"
        return "left" if self.status == "leaving" else "stopped"

    def finish(self, outcome: str) -> None:
        try:
            self.tasks.cancel()
            self.evaluator.close()
            self.examples = self.score_reporter.examples
            self.score_reporter.close(self.learner_step)
            self.parameters = None
            if outcome not in ("left", "fenced") and self.earlier_outcome is None:  # else a successor needs it
                forget(self.client, self.spec.variable)
        except (OSError, RuntimeError, IsgdError):
            logger.exception("run %s: the coordinator could not be closed", self.spec.name)

    @property
    def _is_over(self) -> bool:
        if self.earlier_outcome is not None:
            return True
        if self.learner_ended is None:
            return False
        return self.learner_ended.outcome != "finished" or (self.final_published and not self.evaluator.busy)

    def _work_once(self) -> None:
        event = self.events.get(_POLL)
        if event is not None:
            self._handle(event)
        for event in self.events.drain():
            self._handle(event)
        if self._must_fetch and self.earlier_outcome is None:
            self._must_fetch = False
            self._fetch_parameters()
        if time.monotonic() - self._last_received > _CATCH_UP_AFTER:
            self._last_received = time.monotonic()
            self.events.catch_up()
        for task in self.tasks.completed():
            self._collect(task)
        for found in self.evaluator.completed():
            self.announcer.evaluated(found.incarnation, found.version, loss=found.loss, error=found.error)
        self._submit()
        complete = self.spec.learning.synchronous and len(self.tasks) == 0
        self.score_reporter.report(self.learner_step, complete=complete)
        if self.announcer.heartbeat() and not self._control_reader.busy:  # in the background: a store may be slow
            self._control_reader.offer(self._read_control)

    def _read_control(self) -> None:
        """Look for a newer start of the run: its event may have been lost, or it may be on another cluster."""
        try:
            self.superseded = self.superseded or self.is_superseded()
        except OSError as error:  # it is read again in a second
            logger.warning("run %s: the control file cannot be read: %s", self.spec.name, error)

    # Events ---------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        if isinstance(event, Published | Progress):
            self._last_received = time.monotonic()
        if isinstance(event, Published):
            self._avoid(event.address)
            if self.learner_ended is not None and event.incarnation > self.learner_ended.incarnation:
                self.learner_ended = None  # it has a successor; its own last publication may arrive after its end
            # If its holder is gone, fetching it would be an error in the scheduler's log.
            if event.address:  # otherwise a loop's announcement that no version follows
                self._must_fetch = self.scorers.has_worker(event.address)
            self.final_published = self.final_published or event.final
        elif isinstance(event, Progress):
            self._avoid(event.address)
            self.learner_step = event.step
            if event.probing != (self._probing_since is not None):
                self._probing_since, self._probe_seconds = (time.monotonic() if event.probing else None), 0.0
        elif isinstance(event, Group):
            self.scorers.learners = set(event.learners)
        elif isinstance(event, Control):
            self.superseded = self.superseded or event.attempt > self.spec.attempt
            self.paused = event.want == "pause" and event.attempt == self.spec.attempt
        elif isinstance(event, Ended) and event.role == "coordinator" and event.attempt == self.spec.attempt:
            # Dask runs a task again when the worker that holds its result dies: this one had ended already.
            self.earlier_outcome = event.outcome if event.outcome in ("finished", "stopped") else None
        elif isinstance(event, Ended) and event.role == "learner" and event.attempt == self.spec.attempt:
            self.learner_ended = event if event.outcome not in ("left", "fenced") else None

    def _avoid(self, address: str) -> None:
        """Leave the learner's worker to the learner, if it has one."""
        if not self.spec.external:
            self.scorers.learner = address

    def _fetch_parameters(self) -> None:
        """Fetch the latest version, unless it is of an older incarnation than the one before."""
        found = newest(self.client, self.spec.variable, self.timeout)
        if found is not None and self.latest_version.accepts(found.order):
            self.parameters = found
            self.evaluator.offer(found, self.scorers.placement())

    # Scoring --------------------------------------------------------------------------------

    def _submit(self) -> None:
        if self.parameters is None or self.paused or not self.spec.scores or self.learner_ended is not None:
            return
        room = self._room()
        if room <= 0:
            return
        incarnation, version = self.parameters.order
        orders = self.score_reporter.orders
        excluded = set(self.tasks.chunks) | self._skipped
        found = next_chunks(orders, excluded, room)
        # The stalest chunks come first: after one that is up to date, all are.
        chunks = list(itertools.takewhile(lambda chunk: not orders[chunk] >= sort_key(incarnation, version), found))
        if not chunks:
            return
        group, placement = f"score-{self.spec.run}", self.scorers.placement()
        self.tasks.keep_group(group, placement)
        futures = self.client.map(  # one graph: each costs the scheduler and this worker a millisecond
            score,
            *zip(*((self.parameters.future, self.spec, chunk, incarnation, version) for chunk in chunks), strict=True),
            key=[(group, c, incarnation, version, uuid.uuid4().hex[:8]) for c in chunks],
            pure=False,
            **placement,
        )
        for chunk, future in zip(chunks, futures, strict=True):
            self.tasks.launch(chunk, future, self.parameters.order)

    def _room(self) -> int:
        """Return how many scoring tasks to submit now: all that scorers can hold, or a probe while the gate is closed.

        Runs on the same cluster share its scorers.
        """
        share = self.fair_share.share(self.scorers.capacity())
        if self._probing_since is None:
            return share - len(self.tasks)
        return may_start(
            share // self.spec.scoring.in_flight,
            len(self.tasks),
            probing=True,
            busy_seconds=self._probe_seconds,
            elapsed_seconds=time.monotonic() - self._probing_since,
            task_seconds=self._task_seconds,
        )

    def _collect(self, task: CompletedTask) -> None:
        report = task.result
        if isinstance(report, ScoreReport):
            self._tries.pop(report.chunk, None)
            self.score_reporter.add(report)
            self._task_seconds = report.seconds
            self._probe_seconds += report.seconds
            if report.bad:
                self._fault("norms", f"chunk {report.chunk}: {report.bad} bad norms kept their former weight")
            return
        if isinstance(report, LeaseLostError):
            return  # a straggler of a synchronous run: the chunk is scored again for the successor
        self.faults += 1
        self._fault("score", f"chunk {task.chunk}: {type(report).__name__}: {report}")
        if task.lost:
            if self.parameters is not None and self.parameters.future.status != "finished":
                self.parameters = None  # lost with its holder: scoring resumes with the next version
            return
        tries = self._tries[task.chunk] = self._tries.get(task.chunk, 0) + 1
        if isinstance(report, DataError) and self.spec.scoring.skip_bad_chunks:
            self._skipped.add(task.chunk)
        elif isinstance(report, DataError) or tries >= _TRIES:
            raise _explained(report, task.chunk)

    def _fault(self, what: str, detail: str) -> None:
        logger.warning("run %s: %s: %s", self.spec.name, what, detail)
        self.announcer.fault(what, detail)


def _explained(error: Exception, chunk: int) -> Exception:
    if not isinstance(error, KilledWorker):
        return error
    return WorkersLostError(
        f"chunk {chunk}: every worker that tried to score it died ({error}). "
        "Look at their logs; do they have enough memory for Scoring.batch_size examples?"
    )
