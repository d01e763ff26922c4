"""What a client knows of a run: the events it hears, the two futures it may own, the directory."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distributed import Client, Future, KilledWorker

from dask_isgd import config, errors
from dask_isgd.errors import IsgdError, NoLearnerWorkerError, WaitTimeoutError, WorkersLostError
from dask_isgd.events import Control, Ended, Evaluated, Event, Fault, Heartbeat, Progress, Published, Scored, topic_of
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.dask_internals import NoValidWorkerError
from dask_isgd.runtime.placement import LEARNER, lacks_learner, workers_of
from dask_isgd.storage import RunDirectory

logger = logging.getLogger(__name__)

GOING = ("starting", "running", "paused")
_LOOK = 0.25
_SAY_EVERY = 0.5
_SILENCE = 5.0
_ASK_EVERY = 2.0


class RunMonitor:
    """Follows one run. Where it owns no futures, events and the scheduler's list of tasks must do."""

    def __init__(self, client: Client, directory: RunDirectory, run: str, steps: int) -> None:
        self._client, self._directory, self._run = client, directory, run
        self._learner: Future[Any] | None = None
        self._coordinator: Future[Any] | None = None
        self._events = pubsub.subscribe(client, topic_of(run))
        self._lock = threading.Lock()
        self._latest: dict[str, Any] = {"step": 0, "steps": steps}
        self._ended: dict[str, Ended] = {}
        self._heard = self._began = time.monotonic()
        self._outcome: str | None = None
        self._coordinated = False
        self._waits = False
        """Whether the learner is on the scheduler's list and no worker can take it."""
        self._asked, self._there = -math.inf, False
        self._timeout = config.seconds("cluster.timeout")

    def forget(self) -> None:
        """Drop what was heard so far: the events of earlier starts."""
        for _ in self._events.drain():
            pass

    def own(self, learner: Future[Any], coordinator: Future[Any]) -> None:
        self._learner, self._coordinator = learner, coordinator
        for future in (learner, coordinator):
            future.add_done_callback(self._done)

    @property
    def owned(self) -> list[Future[Any]]:
        """The long tasks that end with this client, unless they are left to the cluster."""
        return [future for future in (self._learner, self._coordinator) if future is not None]

    def _done(self, future: Future[Any]) -> None:
        """Keep the result and let go of the task: Dask runs it again when the worker that holds its result dies."""
        if future.status != "finished" or not self._owns(future):
            return
        try:
            result = future.result(timeout=self._timeout)
        except Exception:  # its worker died already, or the client closes
            return
        with self._lock:
            if future is self._learner:
                self._outcome, self._learner = str(result["outcome"]), None
            elif future is self._coordinator:
                self._coordinator, self._coordinated = None, True

    @property
    def latest(self) -> dict[str, Any]:
        with self._lock:
            for event in self._events.drain():
                self._take(event)
            return dict(self._latest)

    def _take(self, event: Event) -> None:
        latest = self._latest
        if isinstance(event, Progress | Published) or (isinstance(event, Heartbeat) and event.role == LEARNER):
            self._heard = time.monotonic()
            if LEARNER in self._ended and event.incarnation > self._ended[LEARNER].incarnation:
                del self._ended[LEARNER]  # it has a successor; its own last publication may be heard after its end
            if isinstance(event, Published) and event.incarnation != latest.get("incarnation"):
                latest["step"] = event.version  # back at a checkpoint
            latest.update(incarnation=event.incarnation)
        if isinstance(event, Progress):
            latest.update(event.values, step=event.step, gate=event.open)
        elif isinstance(event, Published):
            latest.update(version=event.version, checkpoint=event.checkpoint, learner=event.address)
        elif isinstance(event, Scored):
            latest.update(examples_scored=event.examples, scored_per_second=event.per_second)
        elif isinstance(event, Evaluated):
            latest.update(validation_error=event.error, validation_loss=event.loss, evaluated=event.version)
        elif isinstance(event, Control):
            latest["want"] = event.want
        elif isinstance(event, Fault):
            latest["faults"] = latest.get("faults", 0) + 1
            latest["fault"] = f"{event.what}: {event.detail}"
            if event.what.startswith(LEARNER):  # said by the scheduler
                self._waits = event.what == f"{LEARNER} waits"
        elif isinstance(event, Ended) and event.outcome not in ("left", "fenced"):
            self._ended.setdefault(event.role, event)

    # The state of the run -------------------------------------------------------------------

    @property
    def status(self) -> str:
        self._pending(self._learner)
        latest, learner = self.latest, self._learner
        if any(future is not None and future.status == "error" for future in (learner, self._coordinator)):
            return "failed"
        if self._outcome is not None:
            return "stopped" if self._outcome in ("left", "fenced") else self._outcome
        if LEARNER in self._ended:
            return self._ended[LEARNER].outcome
        if (learner is not None and learner.status in ("cancelled", "lost")) or (learner is None and self._gone()):
            return self._on_disk()
        if "version" not in latest:
            return "starting"
        return "paused" if latest.get("want") == "pause" else "running"

    def _on_disk(self) -> str:
        found = self._directory.checkpoints().latest()
        return "finished" if found is not None and found.state.get("finished") else "stopped"

    def _gone(self) -> bool:
        """Whether nothing is heard of a learner and the scheduler has none; it may be between two workers."""
        if self._waits:
            return False
        now = time.monotonic()
        fresh = self._heard > self._began
        if now - self._heard < (self._timeout if fresh else min(_SILENCE, self._timeout)):
            return False
        if now - self._asked >= _ASK_EVERY:
            self._asked = now
            prefix = f"learn-{self._run}"
            keys = [key for keys in self._client.processing().values() for key in keys]
            self._there = any(isinstance(key, tuple) and key[0] == prefix for key in keys)
        return not self._there

    # Waiting --------------------------------------------------------------------------------

    def listen(self, deadline: float, what: str) -> None:
        """Take the next event, or a short while; WaitTimeoutError once the ``deadline`` is over."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise WaitTimeoutError(f"run {self._run}: waited for {what} and it is {self.status}; it goes on")
        event = self._events.get(min(_LOOK, left))
        if event is not None:
            with self._lock:
                self._take(event)

    def follow(self, deadline: float) -> Iterator[dict[str, Any]]:
        """The latest values, again and again until the run has ended."""
        caught_up = time.monotonic()
        while self.status in GOING:
            yield self.latest
            self.listen(deadline, "the run")
            now = time.monotonic()
            if now - max(self._heard, caught_up) > _SILENCE:
                caught_up = now
                self._events.catch_up()  # an event may have been lost on its way
                self._require_worker()

    def wait(self, deadline: float, progress: Callable[[Mapping[str, Any]], None] | None) -> None:
        """Until both long tasks have ended; raises the error that ended the run."""
        said = 0.0
        for latest in self.follow(deadline):
            if progress is not None and time.monotonic() - said >= _SAY_EVERY:
                said = time.monotonic()
                progress(latest)
        grace = min(deadline, time.monotonic() + self._timeout)
        while self._pending(self._learner):  # its last event came first
            self.listen(grace, "the learner's end")
        self._raise(self._learner)
        self.wait_for_coordinator(min(deadline, time.monotonic() + self._timeout))
        self._raise(self._coordinator)
        for role in (LEARNER, "coordinator"):
            if role in self._ended and self._ended[role].outcome == "failed":
                raise _as_raised(self._run, self._ended[role])
        if progress is not None:
            progress(self.latest)

    def wait_for_coordinator(self, deadline: float) -> None:
        while self._coordinating():
            self.listen(deadline, "the coordinator's end")

    def _coordinating(self) -> bool:
        if self._coordinator is not None or self._coordinated:
            return self._pending(self._coordinator)
        return LEARNER in self._ended and "coordinator" not in self._ended

    def _pending(self, future: Future[Any] | None) -> bool:
        if future is not None and future.status == "finished":
            self._done(future)  # the first try may have met a dying worker
        return future is not None and future.status in ("pending", "finished") and self._owns(future)

    def _owns(self, future: Future[Any]) -> bool:
        return future is self._learner or future is self._coordinator

    def _require_worker(self) -> None:
        """Raise NoLearnerWorkerError if the learner has been silent too long and nobody can run it."""
        silent = time.monotonic() - self._heard
        if silent < self._timeout:
            return
        workers = workers_of(self._client)
        if not workers or lacks_learner(workers):
            raise NoLearnerWorkerError(
                f"run {self._run}: the learner has been silent for {silent:.0f} s and none of {len(workers)} workers "
                f"can take it; start one with `dask worker SCHEDULER --resources 'learner=1' --nthreads 2`. "
                "The run goes on from its newest checkpoint as soon as there is one; wait() again, or stop()"
            )

    def _raise(self, future: Future[Any] | None) -> None:
        if future is None or future.status != "error":
            return
        error = future.exception(timeout=self._timeout)
        if isinstance(error, KilledWorker):
            raise WorkersLostError(
                f"run {self._run}: the worker of {future.key} died again and again without progress in between "
                f"({error}). Look at the workers' logs, memory first; then go on with resume=True"
            ) from error
        if isinstance(error, NoValidWorkerError):
            raise NoLearnerWorkerError(f"run {self._run}: {error}; go on with resume=True") from error
        raise error


def _as_raised(run: str, ended: Ended) -> IsgdError:
    """The error that an event tells of, of its own kind."""
    name, _, message = ended.message.partition(": ")
    if told := re.match(r"(\w+)\((['\"])(.*)", ended.message, re.DOTALL):  # by the scheduler, which knows the repr
        name, message = told[1], told[3].removesuffix(f"{told[2]})")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, IsgdError):
        return kind(message)
    return IsgdError(f"run {run}: the {ended.role} failed at step {ended.step}: {ended.message}")
