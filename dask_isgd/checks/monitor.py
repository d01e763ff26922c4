"""What a client knows of a run: its events, the two futures that it may own, and the run directory."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distributed import Client, Future, KilledWorker

from dask_isgd import config, errors
from dask_isgd.checks.request import ENDLESS
from dask_isgd.display.latest_values import COORDINATOR, LEARNER, SUCCEEDED, LatestValues, of_learner
from dask_isgd.errors import (
    CheckpointError,
    IsgdError,
    LeaseLostError,
    NoLearnerWorkerError,
    WaitTimeoutError,
    WorkersLostError,
)
from dask_isgd.events import Ended, Event, topic_of
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.dask_internals import NoValidWorkerError
from dask_isgd.runtime.placement import lacks_learner, workers_of
from dask_isgd.runtime.task_errors import in_one_sentence
from dask_isgd.storage import RunDirectory

GOING = ("starting", "running", "paused")
_EVENT_TIMEOUT = 0.25
_PROGRESS_INTERVAL = 0.5
_SILENCE = 5.0
_QUERY_INTERVAL = 2.0


class RunMonitor:
    """Follows one run. If it owns no futures, it relies on events and on the scheduler's list of tasks."""

    def __init__(self, client: Client, directory: RunDirectory, run: str, steps: int) -> None:
        self._client, self._directory, self._run, self._name = client, directory, run, directory.name
        self._learner: Future[Any] | None = None
        self._coordinator: Future[Any] | None = None
        self._events = pubsub.subscribe(client, topic_of(run))
        self._lock = threading.Lock()
        self._values = LatestValues(step=0, steps=None if steps == ENDLESS else steps)
        self._began = time.monotonic()
        self._last_event = self._began
        """When the learner's latest event arrived."""
        self._attempt = 0
        """The start of the run that is watched; older ones may still be ending."""
        self._outcome: str | None = None
        self._coordinator_finished = False
        self._last_query, self._task_listed = -math.inf, False
        self._timeout = config.seconds("cluster.timeout")

    def forget(self) -> None:
        """Drop the events received so far: they belong to earlier starts."""
        for _ in self._events.drain():
            pass

    def own(self, learner: Future[Any], coordinator: Future[Any], attempt: int = 0) -> None:
        """Watch the futures of the two long tasks of a start of the run, too."""
        self._learner, self._coordinator, self._attempt = learner, coordinator, attempt
        for future in (learner, coordinator):
            future.add_done_callback(self._collect)

    @property
    def owned(self) -> list[Future[Any]]:
        """The long tasks that end with this client, unless they are left to the cluster."""
        return [future for future in (self._learner, self._coordinator) if future is not None]

    def _collect(self, future: Future[Any]) -> None:
        """Keep the result and release the task: Dask runs it again when the worker that holds its result dies."""
        if future.status != "finished" or not self._owns(future):
            return
        try:
            result = future.result(timeout=self._timeout)
        except Exception:  # its worker has already died, or the client is closing
            return
        with self._lock:
            if future is self._learner:
                self._outcome, self._learner = str(result["outcome"]), None
            elif future is self._coordinator:
                self._coordinator, self._coordinator_finished = None, True

    @property
    def latest(self) -> dict[str, Any]:
        """The latest values by name, a copy; see ``LatestValues.values``."""
        with self._lock:
            for event in self._events.drain():
                self._receive(event)
            return dict(self._values.values)

    def _receive(self, event: Event) -> None:
        if isinstance(event, Ended) and event.attempt < self._attempt:
            return
        if of_learner(event):
            self._last_event = time.monotonic()
        self._values.apply(event)

    # The state of the run -------------------------------------------------------------------

    @property
    def status(self) -> str:
        self._pending(self._learner)
        latest, learner = self.latest, self._learner
        if any(future is not None and future.status == "error" for future in (learner, self._coordinator)):
            return "failed"
        if self._outcome is not None:
            return "stopped" if self._outcome in SUCCEEDED else self._outcome
        if LEARNER in self._values.ended:
            return self._values.ended[LEARNER].outcome
        if (learner is not None and learner.status in ("cancelled", "lost")) or (learner is None and self._gone()):
            return self._on_disk()
        if "version" not in latest:
            return "starting"
        return "paused" if latest.get("want") == "pause" else "running"

    def _on_disk(self) -> str:
        try:
            found = self._directory.checkpoints().latest_manifest()
        except CheckpointError:
            return "stopped"
        return "finished" if found is not None and found["state"].get("finished") else "stopped"

    def _gone(self) -> bool:
        """Return whether the learner is silent and the scheduler has no task of it; it may be between two workers."""
        if self._values.learner_waits:
            return False
        now = time.monotonic()
        seen = self._last_event > self._began
        if now - self._last_event < (self._timeout if seen else min(_SILENCE, self._timeout)):
            return False
        if now - self._last_query >= _QUERY_INTERVAL:
            self._last_query = now
            prefix = f"learn-{self._run}"
            keys = [key for keys in self._client.processing().values() for key in keys]
            self._task_listed = any(isinstance(key, tuple) and key[0] == prefix for key in keys)
        return not self._task_listed

    # Waiting --------------------------------------------------------------------------------

    def listen(self, deadline: float, what: str) -> None:
        """Wait a short while for the next event; raises WaitTimeoutError after the ``deadline``."""
        left = deadline - time.monotonic()
        if left <= 0:
            status = self.status
            rest = "and continues" if status in GOING else "but its tasks have not ended; is the cluster responding?"
            raise WaitTimeoutError(f"run {self._name}: timed out waiting for {what}; the run is {status} {rest}")
        event = self._events.get(min(_EVENT_TIMEOUT, left))
        if event is not None:
            with self._lock:
                self._receive(event)

    def follow(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Yield the latest values, repeatedly, until the run has ended."""
        caught_up = time.monotonic()
        while self.status in GOING:
            yield self.latest
            self.listen(deadline, "the run")
            now = time.monotonic()
            if now - max(self._last_event, caught_up) > _SILENCE:
                caught_up = now
                self._events.catch_up()  # an event may have been lost on its way
                self._require_worker()

    def wait(self, deadline: float, progress: Callable[[Mapping[str, Any]], None] | None) -> None:
        """Wait until both long tasks have ended; raises the error that ended the run."""
        reported = 0.0
        for latest in self.follow(deadline):
            if progress is not None and time.monotonic() - reported >= _PROGRESS_INTERVAL:
                reported = time.monotonic()
                progress(latest)
        grace = min(deadline, time.monotonic() + self._timeout)
        while self._pending(self._learner):  # its last event arrives before its result
            self.listen(grace, "the learner's end")
        self._raise(self._learner)
        if self._outcome in ("fenced", "superseded"):
            raise LeaseLostError(
                f"run {self._name} was taken over: it has been resumed by another client. What this start had trained "
                "is committed, unless the other one began before; attach() watches and controls the run"
            )
        self.wait_for_coordinator(min(deadline, time.monotonic() + self._timeout))
        self._raise(self._coordinator)
        for ended in map(self._values.ended.get, (LEARNER, COORDINATOR)):
            if ended is not None and ended.outcome == "failed":
                raise _as_raised(self._name, ended)

    def conclude(self, values: Mapping[str, Any]) -> None:
        """Replace the latest values by those of the run as a whole."""
        with self._lock:
            self._values.values.update({name: value for name, value in values.items() if value is not None})
            for name in [name for name, value in values.items() if value is None]:
                self._values.values.pop(name, None)

    def wait_for_coordinator(self, deadline: float) -> None:
        """Wait until the coordinator's task has ended."""
        while self._coordinator_runs():
            self.listen(deadline, "the coordinator's end")

    def _coordinator_runs(self) -> bool:
        if self._coordinator is not None or self._coordinator_finished:
            return self._pending(self._coordinator)
        return LEARNER in self._values.ended and COORDINATOR not in self._values.ended

    def _pending(self, future: Future[Any] | None) -> bool:
        if future is not None and future.status == "finished":
            self._collect(future)  # the worker may have died at the first attempt
        return future is not None and future.status in ("pending", "finished") and self._owns(future)

    def _owns(self, future: Future[Any]) -> bool:
        return future is self._learner or future is self._coordinator

    def _require_worker(self) -> None:
        """Raise NoLearnerWorkerError if the learner has been silent for too long and no worker can run it."""
        silent = time.monotonic() - self._last_event
        if silent < self._timeout:
            return
        workers = workers_of(self._client)
        if not workers or lacks_learner(workers):
            raise NoLearnerWorkerError(
                f"run {self._name}: the learner has been silent for {silent:.0f} s and none of the "
                f"{len(workers)} workers can run it; start one with "
                "`dask worker SCHEDULER --resources 'learner=1' --nthreads 2`. "
                "The run then resumes from its latest checkpoint; call wait() again, or stop()"
            )

    def _raise(self, future: Future[Any] | None) -> None:
        if future is None or future.status != "error":
            return
        error = future.exception(timeout=self._timeout)
        if isinstance(error, KilledWorker):
            raise WorkersLostError(
                f"run {self._name}: the worker of {future.key} died repeatedly without progress in between "
                f"({error}). Check the workers' logs for memory use first; then continue with resume=True"
            ) from error
        if isinstance(error, NoValidWorkerError):
            raise NoLearnerWorkerError(f"run {self._name}: {error}; continue with resume=True") from error
        raise in_one_sentence(error)


def _as_raised(run: str, ended: Ended) -> IsgdError:
    """Return the error that an event reports, as its own class."""
    name, _, message = ended.message.partition(": ")
    if found := re.match(r"(\w+)\((['\"])(.*)", ended.message, re.DOTALL):  # sent by the scheduler, which has its repr
        name, message = found[1], found[3].removesuffix(f"{found[2]})")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, IsgdError):
        return kind(message)
    return IsgdError(f"run {run}: the {ended.role} failed at step {ended.step}: {ended.message}")
