"""The learner: one long Dask task that trains, publishes, checkpoints and reports.

It never waits for scorers, unless the run is exact. It is pinned by a resource or an address,
does not secede (that would cost it the grace before its worker ends), and looks every step
whether the cluster still wants it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import dask.config
from dask.typing import Key
from distributed import Client, Worker, get_client, get_worker

from dask_isgd import config
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import LeaseLostError, WaitTimeoutError
from dask_isgd.events import Control, Ended, Event, Fault, Heartbeat, Scored
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.checkpointing import Checkpointer
from dask_isgd.learner.feed import open_feed
from dask_isgd.learner.publisher import Publisher
from dask_isgd.learner.reporter import COLUMNS, Reporter
from dask_isgd.learner.trainer import Trainer
from dask_isgd.learner.weight_reader import WeightReader
from dask_isgd.runtime import pubsub, torch_threads
from dask_isgd.runtime.dask_internals import TaskStatus, task_status

logger = logging.getLogger(__name__)

_ALIVE_EVERY = 1.0


def learn(spec: RunSpec) -> dict[str, Any]:
    """Train to the end, or until the run is stopped or the cluster wants no more; how it ended.

    Raises NonFiniteLossError, StorageFullError, ModelError or DataError; the newest checkpoint
    stands.
    """
    worker, client = get_worker(), get_client()
    own, spare = _torch_threads(spec, worker)
    torch_threads.learner(own)
    try:
        return Learner(spec, worker, client, worker.get_current_task(), own, spare).run()
    finally:
        torch_threads.learner_left()


def _torch_threads(spec: RunSpec, worker: Worker) -> tuple[int, int]:
    """The learner's own, and those it takes while scorers have nothing to do: none where it was told a number."""
    if spec.learning.threads is not None:
        return spec.learning.threads, 0
    own = dask.config.get("isgd.cluster.learner-threads") or worker.state.nthreads
    return own, 0 if spec.learning.synchronous else dask.config.get("isgd.cluster.spare-threads")


class Learner:
    """One incarnation of a run's learner; ``threads`` of torch are its own, ``spare`` ones the scorers'."""

    def __init__(self, spec: RunSpec, worker: Worker, client: Client, key: Key, threads: int, spare: int) -> None:
        self.spec, self.worker, self.client, self.key = spec, worker, client, key
        self._threads, self._spare = threads, spare
        self.timeout = config.seconds("cluster.timeout")
        directory = spec.directory
        self.control = pubsub.subscribe(client, spec.topic)
        self.want = str(directory.control().get("want", "run"))
        self.trainer = Trainer(models.build(spec.model, spec.learning.seed), spec.loss_function, spec.learning)
        self.drawing = BatchSampler(spec)
        self.weights = directory.open_weights()
        if not spec.learning.synchronous:
            self.drawing.load(self.weights)
        self.reader = WeightReader(self.weights, self.timeout, strict=spec.learning.synchronous)
        prepare, folder = Prepare(spec.data, self.trainer.device), worker.local_directory
        self.feed = open_feed(spec.data, self.drawing, prepare, spec.learning, folder=folder, timeout=self.timeout)
        logger.info("feed: %s", self.feed.why)
        # last: whoever leaves in this one's favour has had time to commit
        owner = {"key": str(key), "address": worker.address}
        self.recovery = Checkpointer(
            spec,
            owner,
            self.trainer,
            self.drawing,
            columns=COLUMNS,
            timeout=self.timeout,
            leaves=lambda: self._task_status == "leaving",
        )
        self.incarnation, self.step = self.recovery.incarnation, self.recovery.step
        self._look, self._told = LatestJobWorker("control", self.timeout), 0
        address = worker.address
        self.publications = Publisher(spec, client, self.recovery, address=address, timeout=self.timeout, say=self._say)
        self.reports = Reporter(spec, self.incarnation, address, self.recovery.report, self._say)
        self.deserted = False
        """Whether the coordinator has failed for good."""
        self._entered = False
        self._alive = time.monotonic()

    @property
    def _task_status(self) -> TaskStatus:
        return task_status(self.worker, self.key)

    # The life of an incarnation -------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        outcome, message = "failed", ""
        try:
            outcome = self._until_the_end()
        except LeaseLostError as error:
            outcome, message = "fenced", str(error)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._say(
                Ended(
                    run=self.spec.run,
                    incarnation=self.incarnation,
                    attempt=self.spec.attempt,
                    role="learner",
                    outcome=outcome,
                    step=self.step,
                    message=message[:400],
                )
            )
            self._close()
        seconds = self.recovery.seconds()
        return {"outcome": outcome, "incarnation": self.incarnation, "step": self.step, "seconds": seconds}

    def _until_the_end(self) -> str:
        try:
            return self._loop()
        except LeaseLostError:
            raise
        except (OSError, TimeoutError, RuntimeError):
            # whatever breaks while the cluster goes away is its way of going away
            if self._task_status == "wanted":
                raise
            return self._leave()

    def _loop(self) -> str:
        learning = self.spec.learning
        while self.step < learning.steps:
            self._hear()
            if self.want == "stop" or self.deserted or self._task_status != "wanted":
                return self._leave()
            if self.want == "pause":
                self._pause()
                continue
            if self.step % learning.publish_every == 0 or not self._entered:
                self._entered = self._round()
                if not self._entered:
                    continue
            self._one_step()
            if self.step < learning.steps:
                self.recovery.commit_if_due(self.step)
        self.recovery.boundary = None
        if not self.recovery.finished:  # Dask runs a task again when the worker that holds its result dies
            self.recovery.commit_now(self.step, finished=True)
        self.publications.offer(self.trainer.model, self.step, final=True)
        self.publications.finish()
        return "finished"

    def _leave(self) -> str:
        """Commit, and say why: the user's wish, the death of the owner, or the cluster's."""
        self.recovery.leave(self.step)
        if self.want == "stop" or self.deserted or self._task_status == "cancelled":
            return "stopped"
        return "left"

    def _one_step(self) -> None:
        learning = self.spec.learning
        probe = (self.step + 1) % learning.report_every == 0
        until = min(learning.steps, (self.step // learning.publish_every + 1) * learning.publish_every)
        batch = self.feed(self.step, until if learning.synchronous else learning.steps)
        result = self.trainer.step(
            self.step,
            batch.inputs,
            batch.targets,
            batch.draw.coefficients,
            norms=self.spec.sampling.feedback and not self.spec.sampling.uniform,
            probe=probe,
            indices=batch.draw.indices,
        )
        self.drawing.learned(self.step, batch.draw, result, probe=probe)
        self.step += 1
        self.reports.add(result)
        if probe:
            self._report()
        while not self.drawing.left_out.empty():
            detail = self.drawing.left_out.get()[:400]
            self._say(Fault(run=self.spec.run, incarnation=self.incarnation, what="data", detail=detail))

    def _pause(self) -> None:
        self.recovery.commit_now(self.step)
        while self.want == "pause" and not self.deserted and self._task_status == "wanted":
            event = self.control.get(0.25)
            if event is not None:
                self._take(event)
            self._live()

    # What is heard --------------------------------------------------------------------------

    def _hear(self) -> None:
        for event in self.control.drain():
            self._take(event)
        self._live()
        if not self.spec.learning.synchronous:
            while (item := self.reader.take()) is not None:
                self.drawing.update(*item)

    def _take(self, event: Event) -> None:
        if isinstance(event, Control):
            if event.attempt == self.spec.attempt:
                self._told += 1
                self.want = event.want
        elif isinstance(event, Scored):
            for chunk, incarnation, version in event.chunks:
                # a synchronous run takes no score of an older incarnation, which may have moved on to another version
                if incarnation == self.incarnation or not self.spec.learning.synchronous:
                    self.reader.want(chunk, version)
        elif isinstance(event, Ended) and (event.role, event.outcome) == ("coordinator", "failed"):
            self.deserted = self.deserted or event.attempt == self.spec.attempt

    # Publication and rounds -----------------------------------------------------------------

    def _round(self) -> bool:
        """What happens every ``publish_every`` steps: a version goes out, ages move on.

        False: the synchronous run was interrupted while it waited for its scores.
        """
        exact = self.spec.learning.synchronous
        if exact:
            self.recovery.bound(self.step)
        if exact or not self.publications.busy:
            self.publications.offer(self.trainer.model, self.step)
        if exact and not self.spec.sampling.uniform:
            self.publications.finish()
            if not self._await_scores():
                return False
        self.drawing.refresh(self.step)
        return True

    def _await_scores(self) -> bool:
        """Synchronous mode: every chunk at this very version, taken over in order; False if interrupted."""
        fresh: dict[int, Any] = {}
        deadline = time.monotonic() + self.spec.scoring.timeout_seconds
        while len(fresh) < self.spec.n_chunks:
            for event in self.control.drain():
                self._take(event)
            if self.want != "run" or self.deserted or self._task_status != "wanted":
                return False
            if self._live():
                self._look_for_scores(fresh)
            item = self.reader.take(timeout=0.02)
            if item is not None and item[2] == self.step:
                fresh[item[0]] = item[1]
                deadline = time.monotonic() + self.spec.scoring.timeout_seconds
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"synchronous mode: {len(fresh)} of {self.spec.n_chunks} chunks scored at version {self.step}, and "
                    f"no further one within {self.spec.scoring.timeout_seconds:g} s; are scorers alive?"
                )
        for chunk in sorted(fresh):
            self.drawing.update(chunk, fresh[chunk], self.step)
        return True

    # Reporter --------------------------------------------------------------------------------

    def _report(self) -> None:
        self.reports.report(
            self.step,
            self.drawing,
            seconds=self.recovery.seconds(),
            learning_rate=float(self.trainer.optimizer.param_groups[0]["lr"]),
            threads=torch_threads.learner_has(self._threads + self._spare * self.drawing.idle),
        )

    def _live(self) -> bool:
        """About once a second a sign of life, and a look at what an event may have failed to tell; whether it was."""
        now = time.monotonic()
        if now - self._alive < _ALIVE_EVERY:
            return False
        self._alive = now
        address = self.worker.address
        self._say(Heartbeat(run=self.spec.run, incarnation=self.incarnation, role="learner", address=address))
        if not self._look.busy:  # in the background: a store may take its time
            told = self._told
            self._look.offer(lambda: self._look_what_is_wanted(told))
        return True

    def _look_what_is_wanted(self, told: int) -> None:
        try:
            wanted = self.spec.directory.control()
        except OSError as error:  # it is looked at again in a second, and events tell the same
            logger.warning("run %s: what is wanted cannot be read: %s", self.spec.run, error)
            return
        if wanted.get("attempt") == self.spec.attempt and told == self._told:  # nothing newer was heard meanwhile
            self.want = str(wanted["want"])

    def _look_for_scores(self, fresh: Mapping[int, Any]) -> None:
        """Read what the stamps say is rewritten: an event may have been lost."""
        for chunk, (version, incarnation, _) in enumerate(self.weights.read_stamps()):
            if chunk not in fresh and (incarnation, version) == (self.incarnation, self.step):
                self.reader.want(chunk, self.step)

    def _say(self, event: Event) -> None:
        pubsub.announce(self.worker, self.spec.topic, event)

    def _close(self) -> None:
        for part in (self.feed, self._look, self.publications, self.recovery, self.reader, self.control):
            try:
                part.close()
            except Exception:
                logger.exception("closing the learner of run %s", self.spec.run)
