"""The learner: one long Dask task that trains, publishes, checkpoints and reports.

It never waits for scorers, unless the run is exact. It is pinned by a resource or an address,
does not secede (that would cost it the grace before its worker ends), and looks every step
whether the cluster still wants it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from typing import Any

import dask.config
from dask.typing import Key
from distributed import Client, Future, Worker, get_client, get_worker

from dask_isgd import config, models, pubsub, threads
from dask_isgd.dask_internals import task_is_wanted
from dask_isgd.drawing import Drawing, WeightReader
from dask_isgd.errors import LearnerFenced, WaitTimeout
from dask_isgd.events import Control, Ended, Event, Progress, Published, Scored
from dask_isgd.feed import open_feed
from dask_isgd.publisher import Background, Snapshots
from dask_isgd.spec import RunSpec
from dask_isgd.storage import History, WeightArray
from dask_isgd.training import Trainer

logger = logging.getLogger(__name__)

COLUMNS = (
    *("step", "seconds", "examples", "loss", "gradient_norm", "clipped", "learning_rate", "steps_per_second"),
    *("mean_square", "variance_ideal", "variance_stale", "variance_uniform"),
    *("gain", "candidate_gain", "chunk_gain", "ideal_gain", "gate"),
    *("effective_sample_size", "largest_coefficient", "mean_weight", "scored", "mean_age", "max_age"),
)
_SAY_EVERY = 0.5


def learn(spec: RunSpec) -> dict[str, Any]:
    """Train to the end, or until the run is stopped or the cluster wants no more; how it ended.

    Raises NonFiniteLossError, StorageFullError, ModelError or DataError; the newest checkpoint
    stands.
    """
    worker, client = get_worker(), get_client()
    threads.learner(spec.learning.threads or dask.config.get("isgd.cluster.learner-threads") or worker.state.nthreads)
    try:
        return Learner(spec, worker, client, worker.get_current_task()).run()
    finally:
        threads.learner_left()


class Learner:
    """One incarnation of a run's learner."""

    def __init__(self, spec: RunSpec, worker: Worker, client: Client, key: Key) -> None:
        self.spec, self.worker, self.client, self.key = spec, worker, client, key
        self.timeout = config.seconds("cluster.timeout")
        directory = spec.directory
        self.leases = directory.leases("learner")
        self.incarnation = self.leases.acquire({"key": str(key), "address": worker.address})
        self.control = pubsub.subscribe(client, spec.topic)
        self.want = str(directory.control().get("want", "run"))
        self.trainer = Trainer(models.build(spec.model, spec.learning.seed), spec.loss_function, spec.learning)
        self.drawing = Drawing(spec)
        self.checkpoints = directory.checkpoints()
        self.step, self.seconds = 0, 0.0
        self.checkpoint: str | None = None
        self._restore()
        weights = WeightArray.open(directory.weights)
        if not spec.learning.exact:
            self.drawing.load(weights)
        self.reader = WeightReader(weights, self.timeout)
        prepare, folder = models.Prepare(spec.data, self.trainer.device), worker.local_directory
        self.feed = open_feed(spec.data, self.drawing, prepare, spec.learning, folder=folder, timeout=self.timeout)
        logger.info("feed: %s", self.feed.why)
        rows = (spec.learning.steps - self.step) // spec.learning.report_every + 1
        self.history = History.create(
            directory.history,
            f"learner-{self.incarnation:04d}",
            COLUMNS,
            rows,
            attrs={"incarnation": self.incarnation, "start_step": self.step},
        )
        self.publisher = Background("publication", self.timeout)
        self.committer = Background("checkpoint", self.timeout)
        self.snapshots, self.saved = Snapshots(), Snapshots()
        self.held: deque[Future[Any]] = deque(maxlen=2)
        self._boundary: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._clipped = 0
        self._began = self._said = self._committed = self._reported = time.monotonic()
        self._committed_step = self._reported_step = self.step

    # The life of an incarnation -------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        outcome, message = "failed", ""
        try:
            outcome = self._loop()
        except LearnerFenced as error:
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
        return {"outcome": outcome, "incarnation": self.incarnation, "step": self.step, "seconds": self._seconds()}

    def _loop(self) -> str:
        learning = self.spec.learning
        while self.step < learning.steps:
            self._hear()
            if self.want == "stop" or not task_is_wanted(self.worker, self.key):
                self._commit_now()
                return "stopped" if self.want == "stop" else "left"
            if self.want == "pause":
                self._pause()
                continue
            if self.step % learning.publish_every == 0 or self._boundary is None:
                self._round()
                if self._boundary is None:
                    continue
            self._one_step()
            self._checkpoint_if_due()
        self._boundary = None
        self._commit_now(finished=True)
        self._publish(final=True)
        self.publisher.finish()
        self.history.flush()
        return "finished"

    def _one_step(self) -> None:
        learning = self.spec.learning
        probe = (self.step + 1) % learning.report_every == 0
        until = min(learning.steps, (self.step // learning.publish_every + 1) * learning.publish_every)
        batch = self.feed(self.step, until if learning.exact else learning.steps)
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
        self._losses.append(result.loss)
        self._norms.append(result.gradient_norm)
        self._clipped += result.clipped
        if probe:
            self._report(result.mean_square)

    def _pause(self) -> None:
        self._commit_now()
        while self.want == "pause" and task_is_wanted(self.worker, self.key):
            event = self.control.get(0.25)
            if event is not None:
                self._take(event)

    # What is heard --------------------------------------------------------------------------

    def _hear(self) -> None:
        for event in self.control.drain():
            self._take(event)
        if not self.spec.learning.exact:
            while (item := self.reader.take()) is not None:
                self.drawing.update(*item)

    def _take(self, event: Event) -> None:
        if isinstance(event, Control):
            if event.attempt == self.spec.attempt:
                self.want = event.want
        elif isinstance(event, Scored):
            for chunk, version in event.chunks:
                self.reader.want(chunk, version)
        elif isinstance(event, Ended) and (event.role, event.outcome) == ("coordinator", "failed"):
            if event.attempt == self.spec.attempt:
                self.want = "stop"

    # Publication and rounds -----------------------------------------------------------------

    def _round(self) -> None:
        """What happens every ``publish_every`` steps: a version goes out, ages move on."""
        exact = self.spec.learning.exact
        self._boundary = (self.step, {}, {})
        if exact:
            self._boundary = (self.step, self.saved.take(self.trainer.tensors()), self._state())
        if exact or not self.publisher.busy:
            self._publish()
        if exact and not self.spec.sampling.uniform:
            self.publisher.finish()
            self._await_scores()
        self.drawing.refresh(self.step)

    def _publish(self, *, final: bool = False) -> None:
        tensors, version = self.snapshots.take(models.state_of(self.trainer.model)), self.step

        def job() -> None:
            self.leases.check(self.incarnation)
            parameters = pubsub.publish(
                self.client,
                self.spec.variable,
                tensors,
                run=self.spec.run,
                incarnation=self.incarnation,
                version=version,
            )
            self.held.append(parameters.future)
            self._say(
                Published(
                    run=self.spec.run,
                    incarnation=self.incarnation,
                    version=version,
                    address=self.worker.address,
                    checkpoint=self.checkpoint,
                    final=final,
                )
            )

        self.publisher.offer(job)

    def _await_scores(self) -> None:
        """Exact mode: every chunk at this very version, taken over in order."""
        fresh: dict[int, Any] = {}
        deadline = time.monotonic() + self.spec.scoring.timeout_seconds
        while len(fresh) < self.spec.n_chunks:
            for event in self.control.drain():
                self._take(event)
            if self.want != "run" or not task_is_wanted(self.worker, self.key):
                self._boundary = None
                return
            item = self.reader.take(timeout=0.02)
            if item is not None and item[2] == self.step:
                fresh[item[0]] = item[1]
                deadline = time.monotonic() + self.spec.scoring.timeout_seconds
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"exact mode: {len(fresh)} of {self.spec.n_chunks} chunks scored at version {self.step}, and no "
                    f"further one within {self.spec.scoring.timeout_seconds:g} s; are scorers alive?"
                )
        for chunk in sorted(fresh):
            self.drawing.update(chunk, fresh[chunk], self.step)

    # Checkpoints ----------------------------------------------------------------------------

    def _state(self, *, finished: bool = False) -> dict[str, Any]:
        return {
            "run": self.spec.run,
            "seconds": self._seconds(),
            "seed": self.spec.learning.seed,
            "trainer": self.trainer.state(),
            "drawing": self.drawing.state(),
            "finished": finished,
        }

    def _checkpoint_if_due(self) -> None:
        learning = self.spec.learning
        due = time.monotonic() - self._committed >= learning.checkpoint_seconds
        if learning.checkpoint_steps is not None:
            due = due or self.step - self._committed_step >= learning.checkpoint_steps
        if not due or self.committer.busy or self.step >= learning.steps:
            return
        if learning.exact:
            assert self._boundary is not None
            step, tensors, state = self._boundary
        else:
            step, tensors, state = self.step, self.saved.take(self.trainer.tensors()), self._state()
        if step > self._committed_step:
            self._committed, self._committed_step = time.monotonic(), step
            self.committer.offer(lambda: self._commit(step, tensors, state))

    def _commit_now(self, *, finished: bool = False) -> None:
        """Commit and wait; in exact mode the boundary of the round, from which it resumes bit by bit."""
        self.committer.finish()
        step, tensors, state = self.step, self.trainer.tensors(), self._state(finished=finished)
        if self.spec.learning.exact and self._boundary is not None:
            step, tensors, state = self._boundary
        if step > self._committed_step or finished:
            self._committed, self._committed_step = time.monotonic(), step
            self._commit(step, tensors, state)

    def _commit(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self.leases.check(self.incarnation)
        arrays, odd = models.to_arrays(tensors)
        self.checkpoint = self.checkpoints.commit(step, self.incarnation, arrays, {**state, "dtypes": odd})
        self.history.flush()

    def _restore(self) -> None:
        found = self.checkpoints.latest()
        if found is None:
            return
        tensors = models.from_arrays(found.tensors, found.state["dtypes"])
        self.trainer.restore(tensors, found.state["trainer"])
        self.drawing.restore(found.state["drawing"])
        self.step, self.seconds, self.checkpoint = found.step, float(found.state["seconds"]), found.name

    # Reports --------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._began

    def _report(self, mean_square: float) -> None:
        now = time.monotonic()
        count = len(self._losses)
        row: dict[str, float] = {
            "step": self.step,
            "seconds": self._seconds(),
            "examples": self.step * self.spec.learning.batch_size,
            "loss": math.fsum(self._losses) / count,
            "gradient_norm": math.fsum(self._norms) / count,
            "clipped": self._clipped / count,
            "learning_rate": float(self.trainer.optimizer.param_groups[0]["lr"]),
            "steps_per_second": count / max(now - self._reported, 1e-9),
            "mean_square": mean_square,
            **self.drawing.report(self.step),
        }
        self._losses, self._norms, self._clipped, self._reported = [], [], 0, now
        self.history.append({name: float(row[name]) for name in COLUMNS})
        if now - self._said >= _SAY_EVERY or self.step >= self.spec.learning.steps:
            self._said = now
            self._say(
                Progress(
                    run=self.spec.run,
                    incarnation=self.incarnation,
                    step=self.step,
                    address=self.worker.address,
                    open=self.drawing.open,
                    values={name: float(f"{row[name]:.6g}") for name in COLUMNS},
                )
            )
            if not self.committer.busy:  # a checkpoint flushes too
                self.committer.offer(self.history.flush)

    def _say(self, event: Event) -> None:
        pubsub.announce(self.worker, self.spec.topic, event)

    def _close(self) -> None:
        for part in (self.feed, self.publisher, self.committer, self.reader, self.control):
            try:
                part.close()
            except Exception:
                logger.exception("closing the learner of run %s", self.spec.run)
