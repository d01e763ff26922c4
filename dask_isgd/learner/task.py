"""The learner: one long Dask task that trains, publishes, checkpoints and reports.

It never waits for scorers, unless the run is synchronous. It is pinned by a resource or an address,
does not secede (that would cost it the grace period before its worker ends), and checks at every step
whether the cluster still wants it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from dask.typing import Key
from distributed import Client, Worker, get_client, get_worker

from dask_isgd import config
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import RunMismatchError, RunNotFoundError, WaitTimeoutError
from dask_isgd.events import Control, Ended, Event, Scored
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.checkpointing import Checkpointer
from dask_isgd.learner.feed import Feed, open_feed
from dask_isgd.learner.feedback_pace import FeedbackPace
from dask_isgd.learner.presampling import Presampler
from dask_isgd.learner.publisher import Publisher
from dask_isgd.learner.reporter import COLUMNS, Reporter
from dask_isgd.learner.stepper import Stepper
from dask_isgd.learner.threads import learner_threads
from dask_isgd.learner.trainer import Trainer
from dask_isgd.learner.weight_reader import WeightReader
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.allocator import keep_freed_memory
from dask_isgd.runtime.announcer import Announcer
from dask_isgd.runtime.dask_internals import calm, memory_limit, unmetered
from dask_isgd.runtime.long_task import LongTask, Parts
from dask_isgd.runtime.torch_threads import LearnerThreads

logger = logging.getLogger(__name__)

_PAUSED_POLL = 0.25


@unmetered
def learn(spec: RunSpec) -> dict[str, Any]:
    """Train to the end, or until the user or the cluster stops the run; return how it ended.

    Raises NonFiniteLossError, StorageFullError, ModelError or DataError; the latest checkpoint
    stays valid.
    """
    worker, client = get_worker(), get_client()
    keep_freed_memory(memory_limit())
    calm(worker)
    with learner_threads(spec, worker) as threads:
        learner = Learner(spec, worker, client, worker.get_current_task(), threads)
        return learner.result(learner.run_or_reschedule())


class Learner(LongTask):
    """One incarnation of a run's learner."""

    feed: Feed
    stepper: Stepper

    def __init__(self, spec: RunSpec, worker: Worker, client: Client, key: Key, threads: LearnerThreads) -> None:
        super().__init__(worker, client, key)
        self.spec = spec
        self.timeout = config.seconds("cluster.timeout")
        self.step = 0
        self.wanted = "run"
        """What the user wants: ``"run"``, ``"pause"`` or ``"stop"``."""
        self.superseded = False
        """Whether the run has been started again."""
        self.incarnation = 0
        """0 until the lease is acquired."""
        self.coordinator_failed = False
        """Whether the coordinator has failed for good."""
        self.learners_scoring, self.roles_worth = 0, math.nan
        """Columns of the history: workers that score and could learn, and the worth of other roles."""
        self._threads = threads
        self._controls_received = 0
        self._round_started = False
        self._next_evaluation = 0

    def is_superseded(self) -> bool:
        return self.spec.directory.attempt() > self.spec.attempt

    def open(self, parts: Parts) -> None:
        spec, learning, worker = self.spec, self.spec.learning, self.worker
        self._require_same_data()
        self.events = parts.add(pubsub.subscribe(self.client, spec.topic))
        self._read_control(0)
        self.trainer = Trainer(
            models.build(spec.model, learning.seed), spec.loss_function, learning, weighted=not spec.sampling.uniform
        )
        self.batch_sampler = BatchSampler(
            spec.examples,
            spec.chunk,
            spec.learning.batch_size,
            spec.sampling,
            seed=spec.learning.seed,
            report_every=spec.learning.report_every,
            reproducible=spec.learning.synchronous,
            skip_bad_chunks=spec.scoring.skip_bad_chunks,
            scored=spec.scores,
            keep_feedback=learning.learners != 1,
            pool=spec.sampling.presample,
        )
        self.weights = spec.directory.open_weights()
        if not learning.synchronous:
            self.batch_sampler.load(self.weights)
        self.weight_reader = parts.open(WeightReader(self.weights, self.timeout, strict=learning.synchronous))
        self._open_feed(parts)
        # The lease comes last: a predecessor that leaves has had time to commit.
        self.checkpointer = parts.open(
            Checkpointer(
                spec,
                {"key": str(self.key), "address": worker.address},
                self.trainer,
                self.batch_sampler,
                columns=COLUMNS,
                timeout=self.timeout,
                is_leaving=lambda: self.status == "leaving",
            )
        )
        self.step, self.lease = self.checkpointer.step, self.checkpointer.lease
        self.incarnation = self.lease.incarnation
        self.announcer = Announcer(worker, spec.run, "learner", spec.attempt, self.incarnation)
        publisher = Publisher(
            self.client,
            spec.variable,
            self.announcer,
            self.lease,
            checkpoint=lambda: self.checkpointer.latest,
            dtype=learning.publish_dtype,
            strict=learning.synchronous,
            timeout=self.timeout,
        )
        self.publisher = parts.open(publisher)
        self.reporter = Reporter(
            self.announcer,
            self.checkpointer.report,
            steps=learning.steps,
            batch_size=learning.batch_size,
            synchronous=learning.synchronous,
        )
        self._open_stepper()
        self._control_reader = parts.open(LatestJobWorker("control", self.timeout))

    def _open_feed(self, parts: Parts) -> None:
        learning = self.spec.learning
        feed = open_feed(
            self.spec.data,
            self.batch_sampler,
            Prepare(self.spec.data, self.trainer.device),
            dataclasses.replace(learning, batch_size=learning.batch_size * self.spec.sampling.presample),
            folder=self.worker.local_directory,
            timeout=self.timeout,
            skip_incomplete=self.spec.scoring.skip_bad_chunks,
        )
        self.feed = parts.add(feed)
        logger.info("feed: %s", self.feed.reason)

    def _open_stepper(self) -> None:
        learning = self.spec.learning
        self.stepper = Stepper(
            self.trainer,
            self.feed,
            self.batch_sampler,
            self.reporter,
            self._report,
            pace=self._pace(),
            report_every=learning.report_every,
            lag=0 if learning.synchronous or self.trainer.device.type == "cpu" else 1,
            presampler=self._presampler(),
        )

    def _presampler(self) -> Presampler | None:
        learning, sampling = self.spec.learning, self.spec.sampling
        if sampling.presample == 1:
            return None
        most = sampling.largest_coefficient
        return Presampler(
            self.trainer.model, self.trainer.loss, size=learning.batch_size, most=most, seed=learning.seed
        )

    def _pace(self) -> FeedbackPace | None:
        feedback = self.spec.sampling.feedback and not self.spec.sampling.uniform
        if not feedback:
            return None
        sampler = self.batch_sampler.sampler
        return FeedbackPace(fixed=self.spec.learning.synchronous, alone=lambda: sampler.from_feedback)

    def _require_same_data(self) -> None:
        """Raise RunMismatchError if the data were rewritten since the run began: their weights would be of others."""
        spec = self.spec
        if spec.directory.document("data")["data"] != spec.data.fingerprint():
            raise RunMismatchError(
                f"{spec.data!r} was changed since run {spec.name} began: shapes, dtypes, chunks or the content of its "
                "first, middle or last chunk differ. Restore the data, or start a new run in another directory"
            )

    def result(self, outcome: str) -> dict[str, Any]:
        """Return the result of the task."""
        return {"outcome": outcome, "incarnation": self.incarnation, "step": self.step}

    @property
    def last_step(self) -> int:
        return self.step

    # The loop -------------------------------------------------------------------------------

    def work(self) -> str:
        learning = self.spec.learning
        while self.step < learning.steps:
            self._receive()
            if self._must_end and self.stepper.at_rest:
                return self.leave()
            if self.wanted == "pause" and self.stepper.at_rest:
                self._pause()
                continue
            if self.step % learning.publish_every == 0 or not self._round_started:
                self._round_started = self._start_round()
                if not self._round_started:
                    continue
            self._take_step()
            if self.step < learning.steps and self.stepper.at_rest and self.checkpointer.is_due(self.step):
                self.stepper.settle()
                self.checkpointer.commit_soon(self.step)
        self._end_steps()
        self.checkpointer.round_start = None
        if not self.checkpointer.finished:  # Dask runs a task again when the worker that holds its result dies
            self.checkpointer.commit_now(self.step, finished=True)
        self.publisher.offer(self.trainer.model, self.step, final=True)
        self.publisher.finish()
        return "finished"

    @property
    def _must_end(self) -> bool:
        return self.wanted == "stop" or self._is_abandoned

    @property
    def _is_abandoned(self) -> bool:
        """Whether the cluster no longer wants this task, the run was started again, or the coordinator has failed."""
        return self.superseded or self.coordinator_failed or self.status != "wanted"

    def leave(self) -> str:
        """Commit; the outcome depends on who ended the run: a newer start, the user or its client, or the cluster."""
        self._end_steps()
        self.checkpointer.leave(self.step)
        if self.superseded:
            return "superseded"
        if self.wanted == "stop" or self.coordinator_failed or self.status == "cancelled":
            return "stopped"
        return "left"

    def _end_steps(self) -> None:
        self.stepper.settle()
        self.stepper.end()

    def _take_step(self) -> None:
        learning = self.spec.learning
        until = min(learning.steps, (self.step // learning.publish_every + 1) * learning.publish_every)
        self.stepper.take(self.step, until if learning.synchronous else learning.steps)
        self.step += 1
        while not self.batch_sampler.left_out.empty():
            self.announcer.fault("data", self.batch_sampler.left_out.get())

    def _report(self, step: int) -> None:
        self.reporter.report(
            step,
            self.batch_sampler,
            seconds=self.checkpointer.seconds(),
            learning_rate=self.trainer.update.learning_rate,
            threads=self._threads.resize(scorers_idle=self.batch_sampler.idle),
            learners=self.stepper.learners,
            learners_scoring=self.learners_scoring,
            roles_worth=self.roles_worth,
        )

    def _pause(self) -> None:
        self.stepper.settle()
        self.checkpointer.commit_now(self.step)
        while self.wanted == "pause" and not self._is_abandoned:
            event = self.events.get(_PAUSED_POLL)
            if event is not None:
                self._handle(event)
            self._heartbeat()
            self.stepper.keep_waiting()

    # Events ---------------------------------------------------------------------------------

    def _receive(self) -> None:
        self._handle_events()
        self._heartbeat()
        if not self.spec.learning.synchronous:
            while (rewritten := self.weight_reader.get()) is not None:
                self.batch_sampler.update(*rewritten)

    def _handle_events(self) -> None:
        for event in self.events.drain():
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Control):
            self.superseded = self.superseded or event.attempt > self.spec.attempt
            if event.attempt == self.spec.attempt:
                self._controls_received += 1
                self.wanted = event.want
        elif isinstance(event, Scored):
            for chunk, incarnation, version in event.chunks:
                # A synchronous run ignores scores of older incarnations, whose versions may differ from its own.
                if incarnation == self.incarnation or not self.spec.learning.synchronous:
                    self.weight_reader.request(chunk, version)
        elif isinstance(event, Ended) and (event.role, event.outcome) == ("coordinator", "failed"):
            self.coordinator_failed = self.coordinator_failed or event.attempt == self.spec.attempt

    def _heartbeat(self) -> bool:
        """Announce a heartbeat if it is due, and read the control file, as an event may have been lost."""
        due = self.announcer.heartbeat()
        if due and not self._control_reader.busy:  # in the background: a store may be slow
            received = self._controls_received
            self._control_reader.offer(lambda: self._read_control(received))
        return due

    def _read_control(self, received: int) -> None:
        try:
            control = self.spec.directory.control()
        except (OSError, RunNotFoundError) as error:  # it is read again in a second, and events carry the same
            logger.warning("run %s: the control file cannot be read: %s", self.spec.name, error)
            return
        attempt = control.get("attempt", self.spec.attempt)  # none: the file was damaged, and written again
        self.superseded = self.superseded or attempt > self.spec.attempt
        if attempt == self.spec.attempt and received == self._controls_received:  # no later event came
            self.wanted = str(control["want"])

    # Publication and rounds -----------------------------------------------------------------

    def _start_round(self) -> bool:
        """Publish a version and refresh the ages, every ``publish_every`` steps.

        Return False if a synchronous run was interrupted while it waited for its scores.
        """
        synchronous = self.spec.learning.synchronous
        self.stepper.settle()
        if synchronous:
            self.checkpointer.start_round(self.step)
        evaluates = self.spec.validation is not None and self.step >= self._next_evaluation
        if synchronous or self.publisher.is_ready(wanted=evaluates or self.spec.scores):
            self.publisher.offer(self.trainer.model, self.step)
            if evaluates:
                self._next_evaluation = self.step + self.spec.learning.evaluate_every
        if synchronous and not self.spec.sampling.uniform:
            self.publisher.finish()
            if not self._await_scores():
                return False
        self.batch_sampler.refresh(self.step)
        return True

    def _await_scores(self) -> bool:
        """Wait for the scores of every chunk at this very version, and use them in order; False if interrupted."""
        scored: dict[int, Any] = {}
        timeout = self.spec.scoring.timeout_seconds
        deadline = time.monotonic() + timeout
        while len(scored) < self.spec.n_chunks:
            self._handle_events()
            if self.wanted != "run" or self._is_abandoned:
                return False
            self.stepper.keep_waiting()
            if self._heartbeat():
                self._request_missed(scored)
            rewritten = self.weight_reader.get(timeout=0.02)
            if rewritten is not None and rewritten[2] == self.step:
                scored[rewritten[0]] = rewritten[1]
                deadline = time.monotonic() + timeout
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"synchronous mode: {len(scored)} of {self.spec.n_chunks} chunks scored at version {self.step}, "
                    f"and no further one within {timeout:g} s; are scorers alive?"
                )
        for chunk in sorted(scored):
            self.batch_sampler.update(chunk, scored[chunk], self.step)
        return True

    def _request_missed(self, scored: Mapping[int, Any]) -> None:
        """Request the chunks that were rewritten according to their stamps, as an event may have been lost."""
        for chunk, (version, incarnation, _) in enumerate(self.weights.read_stamps()):
            if chunk not in scored and (incarnation, version) == (self.incarnation, self.step):
                self.weight_reader.request(chunk, self.step)
