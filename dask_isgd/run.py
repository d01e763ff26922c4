"""``fit``, ``attach`` and ``Run``: start a run, find one again, watch and steer it.

The client submits the two long tasks and then only watches; the run directory is the truth.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client, Future, fire_and_forget

from dask_isgd import config, display, models, preflight, pubsub
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.coordinator import coordinate
from dask_isgd.errors import CheckpointError, ConfigError, IsgdError, RunNotFoundError, WaitTimeout
from dask_isgd.events import Control, Ended, Evaluated, Event, Fault, Progress, Published, Scored, topic_of
from dask_isgd.learner import learn
from dask_isgd.placement import for_coordinator, for_learner
from dask_isgd.storage import Dataset, RunDirectory, read_history

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure
    from torch import nn

logger = logging.getLogger(__name__)

_LOOK = 0.25
_LAST_REPORTS = 0.1


def fit(
    client: Client,
    model: models.ModelSource,
    data: Dataset | str | Path,
    run_dir: str | Path,
    *,
    loss: models.Loss | None = None,
    learning: Learning,
    scoring: Scoring | None = None,
    sampling: Sampling | None = None,
    validation: Dataset | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    detach: bool = False,
) -> Run:
    """Train a model by importance sampling on a Dask cluster; returns once training has begun to.

    ``model`` is a callable without arguments that builds an ``nn.Module``, or its
    ``"package.module:name"``; ``data`` a Zarr dataset (URL, path or ``Dataset``); ``run_dir`` where
    the run lives, seen by every worker; ``loss(output, target)`` returns one loss per example,
    shape (B,), cross entropy by default. With ``detach`` the run outlives the client.

    Raises, before anything is submitted, every error of ``dask_isgd.errors`` that settings, data,
    model, run directory or workers give rise to.
    """
    plan = preflight.check(
        model,
        data,
        run_dir,
        loss=loss,
        learning=learning,
        scoring=scoring,
        sampling=sampling,
        validation=validation,
        resume=resume,
        overwrite=overwrite,
        detach=detach,
    )
    return start(client, plan)


def start(client: Client, plan: preflight.Plan) -> Run:
    """Submit a run that has passed the checks which need no cluster."""
    workers = preflight.wait_for_workers(client)
    preflight.create(plan)
    try:
        workers = preflight.check_cluster(client, plan)
    except BaseException:
        if not plan.resume:
            plan.spec.directory.remove()
        raise
    spec = plan.spec
    if len(workers) == 1:
        logger.warning("run %s: the cluster has one worker; scoring shares it with the learner", spec.run)
    run = Run(client, spec.directory, spec.model)
    for _ in run._events.drain():  # those of earlier starts
        pass
    pubsub.open_variable(client, spec.variable)
    learner = for_learner(workers)
    futures = [
        client.submit(learn, spec, key=(f"learn-{spec.run}", spec.attempt), pure=False, priority=10, **learner),
        client.submit(
            coordinate,
            spec,
            key=(f"coordinate-{spec.run}", spec.attempt),
            pure=False,
            priority=20,
            **for_coordinator(workers, learner),
        ),
    ]
    if spec.detach:
        fire_and_forget(futures)
    run._own(*futures)
    return run


def attach(client: Client, run_dir: str | Path, model: models.ModelSource | None = None) -> Run:
    """Watch and steer a run that another client started, on a cluster or on disk only."""
    directory = RunDirectory(str(run_dir))
    directory.document()
    return Run(client, directory, model)


class Run:
    """A run as its user sees it."""

    def __init__(self, client: Client, directory: RunDirectory, model: models.ModelSource | None) -> None:
        self.document = directory.document()
        self.name = str(self.document["run"])
        self.directory = directory
        self._client, self._model = client, model
        self._learner: Future[Any] | None = None
        self._coordinator: Future[Any] | None = None
        self._events = pubsub.subscribe(client, topic_of(self.name))
        self._lock = threading.Lock()
        self._latest: dict[str, Any] = {"step": 0, "steps": self._steps}
        self._ended: Ended | None = None
        self._ended_coordinator: Ended | None = None

    def _own(self, learner: Future[Any], coordinator: Future[Any]) -> None:
        self._learner, self._coordinator = learner, coordinator

    @property
    def _steps(self) -> int:
        return int(self.document["config"]["learning"]["steps"])

    # Watching -------------------------------------------------------------------------------

    @property
    def latest(self) -> dict[str, Any]:
        """The newest values heard: step, loss, gain, steps_per_second, test_error and so on."""
        with self._lock:
            for event in self._events.drain():
                self._take(event)
            return dict(self._latest)

    def _take(self, event: Event) -> None:
        latest = self._latest
        if isinstance(event, Progress):
            latest.update(event.values, step=event.step, gate=event.open, incarnation=event.incarnation)
            self._ended = None
        elif isinstance(event, Published):
            latest.update(version=event.version, checkpoint=event.checkpoint, learner=event.address)
            self._ended = None
        elif isinstance(event, Scored):
            latest.update(scored_examples=event.examples, scored_per_second=event.per_second)
        elif isinstance(event, Evaluated):
            latest.update(test_error=event.error, test_loss=event.loss, evaluated=event.version)
        elif isinstance(event, Control):
            latest["want"] = event.want
        elif isinstance(event, Fault):
            latest["faults"] = latest.get("faults", 0) + 1
            latest["fault"] = f"{event.what}: {event.detail}"
        elif isinstance(event, Ended) and event.role == "learner" and event.outcome not in ("left", "fenced"):
            self._ended = event
        elif isinstance(event, Ended) and event.role == "coordinator":
            self._ended_coordinator = event

    @property
    def status(self) -> str:
        """``"starting"``, ``"running"``, ``"paused"``, ``"finished"``, ``"stopped"`` or ``"failed"``."""
        latest = self.latest
        if self._learner is not None and self._learner.status == "error":
            return "failed"
        if self._coordinator is not None and self._coordinator.status == "error":
            return "failed"
        if self._learner is not None and self._learner.status == "finished":
            return _outcome(self._learner.result(timeout=config.seconds("cluster.timeout")))
        if self._ended is not None:
            return self._ended.outcome
        if self._learner is not None and self._learner.status in ("cancelled", "lost"):
            return "stopped"
        if "version" not in latest:
            found = self.directory.checkpoints().latest() if self._learner is None else None
            if found is not None:
                return "finished" if found.state.get("finished") else "stopped"
            return "starting"
        return "paused" if latest.get("want") == "pause" else "running"

    def wait(
        self, timeout: float | None = None, progress: Callable[[Mapping[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Wait for the end of the run, ``timeout`` seconds at most; its summary.

        ``progress`` is called with the latest values about twice a second. Ctrl-C stops the
        waiting, not the run. Raises the error that ended the run, WaitTimeout otherwise.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        said = 0.0
        while self.status in ("starting", "running", "paused"):
            self._pause(deadline, "the run")
            if progress is not None and time.monotonic() - said >= 0.5:
                said = time.monotonic()
                progress(self.latest)
        grace = min(deadline, time.monotonic() + config.seconds("cluster.timeout"))
        while self._learner is not None and self._learner.status == "pending":  # its last event came first
            self._pause(grace, "the learner's end")
        self._raise(self._learner)
        grace = min(deadline, time.monotonic() + config.seconds("cluster.timeout"))
        while self._coordinating():
            self._pause(grace, "the coordinator's last evaluation")
        self._raise(self._coordinator)
        if self._ended is not None and self._ended.outcome == "failed":
            raise IsgdError(f"run {self.name} failed at step {self._ended.step}: {self._ended.message}")
        if progress is not None:
            progress(self.latest)
        return self.summary()

    def _coordinating(self) -> bool:
        if self._coordinator is not None:
            return self._coordinator.status == "pending"
        return self._ended is not None and self._ended_coordinator is None

    def _pause(self, deadline: float, what: str) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise WaitTimeout(f"run {self.name}: waited for {what} and it is {self.status}; it goes on")
        event = self._events.get(min(_LOOK, left))
        if event is not None:
            with self._lock:
                self._take(event)

    def _raise(self, future: Future[Any] | None) -> None:
        if future is not None and future.status == "error":
            pubsub.result(future, config.seconds("cluster.timeout"))

    @property
    def history(self) -> xr.Dataset:
        """What the learner reported: one row every ``report_every`` steps, dimension ``report``."""
        return read_history(self.directory.history, prefix="learner")

    @property
    def evaluations(self) -> xr.Dataset:
        """Loss and error on the validation data, one row for each version evaluated."""
        return read_history(self.directory.history, prefix="evaluation")

    def summary(self) -> dict[str, Any]:
        """The run in a few figures, from its directory."""
        return summarise(self.directory, str(self.latest.get("scored_examples", "")))

    def plot(self) -> Figure:
        """Loss, test error, variance and gain: a matplotlib figure."""
        from dask_isgd.plots import plot

        return plot(self.history, self.evaluations, title=f"run {self.name}")

    def __repr__(self) -> str:
        latest = self.latest
        return f"<Run {self.name}: {self.status}, step {latest['step']} of {latest['steps']}>"

    def _repr_html_(self) -> str:
        return display.html(self.name, self.status, self.latest)

    # Steering -------------------------------------------------------------------------------

    def pause(self) -> None:
        """Checkpoint and hold; workers stay."""
        self._want("pause")

    def unpause(self) -> None:
        """Go on after ``pause``."""
        self._want("run")

    def stop(self, timeout: float | None = None) -> str:
        """Checkpoint and end; waits for it and returns the status."""
        self._want("stop")
        timeout = config.seconds("cluster.timeout") if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while self.status in ("starting", "running", "paused"):
            self._pause(deadline, "the run to stop")
        while self._coordinating():
            self._pause(deadline, "the coordinator to stop")
        return self.status

    def _want(self, want: str) -> None:
        self.directory.set_control(want=want)
        attempt = int(self.directory.control()["attempt"])
        control = Control(run=self.name, incarnation=0, attempt=attempt, want=want)
        pubsub.announce(self._client, topic_of(self.name), control)

    def model(self) -> nn.Module:
        """The model with the parameters of the newest checkpoint, in eval mode."""
        if self._model is None:
            raise ConfigError(
                f"run {self.name} was attached without a model; pass it: attach(client, run_dir, model=…), "
                f"the one it was trained with ({self.document['model']['name']})"
            )
        found = self.directory.checkpoints().latest()
        if found is None:
            raise CheckpointError(f"run {self.name} has no checkpoint yet; wait for the first, or stop it")
        tensors = models.from_arrays(found.tensors, found.state["dtypes"])
        module = models.build(self._model)
        models.load(module, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        return module.eval()


def summarise(directory: RunDirectory, scored: str = "") -> dict[str, Any]:
    """A run's figures from its directory; None where there is no figure.

    train_loss: mean of the unbiased estimates of the last tenth of the reports; test_error: share
    wrong of the whole validation data at the last version evaluated; variance: traces for one draw.
    """
    document = directory.document()
    history = read_history(directory.history, prefix="learner")
    evaluations = read_history(directory.history, prefix="evaluation")
    rows = history.sizes.get("report", 0)
    tail = history.isel(report=slice(rows - max(1, int(rows * _LAST_REPORTS)), rows)) if rows else None

    def last(name: str, *, mean: bool = False) -> float | None:
        if tail is None:
            return None
        value = float(tail[name].mean() if mean else tail[name][-1])
        return value if math.isfinite(value) else None

    found = directory.checkpoints().latest()
    if found is None and not rows:
        raise RunNotFoundError(f"{directory.url}: nothing was trained yet; wait for the first checkpoint")
    seconds = float(found.state["seconds"]) if found is not None else (last("seconds") or 0.0)
    step = found.step if found is not None else int(last("step") or 0)
    error = float(evaluations["error"][-1]) if evaluations.sizes.get("report", 0) else math.nan
    return {
        "run": str(directory.url),
        "steps": step,
        "seconds": round(seconds, 3),
        "train_loss": last("loss", mean=True),
        "test_error": error if math.isfinite(error) else None,
        "variance": {kind: last(f"variance_{kind}", mean=True) for kind in ("ideal", "stale", "uniform")},
        "gain": last("gain", mean=True),
        "scored": int(scored) if scored else 0,
        "steps_per_second": round(step / seconds, 3) if seconds else None,
        "sampling": "uniform" if document["config"]["sampling"]["uniform"] else "importance",
    }


def _outcome(result: Mapping[str, Any]) -> str:
    outcome = str(result["outcome"])
    return "stopped" if outcome in ("left", "fenced") else outcome
