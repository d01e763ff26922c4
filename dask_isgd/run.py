"""``fit``, ``attach`` and ``Run``: start a run, find one again, watch and steer it.

The client submits the two long tasks and then only watches; the run directory is the truth.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client, fire_and_forget, span

from dask_isgd import config, display, models, preflight, pubsub
from dask_isgd.callbacks import Callback
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.coordinator import coordinate
from dask_isgd.errors import CheckpointError, ConfigError, RunNotFoundError, WaitTimeout
from dask_isgd.events import Control, topic_of
from dask_isgd.following import following
from dask_isgd.hardest import Hardest, hardest
from dask_isgd.keeper import keep
from dask_isgd.learner import learn
from dask_isgd.placement import for_coordinator, for_learner
from dask_isgd.storage import Dataset, RunDirectory
from dask_isgd.watching import GOING, Watch

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure
    from torch import nn

logger = logging.getLogger(__name__)

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
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Train a model by importance sampling on a Dask cluster; returns once training has begun to.

    ``model`` is a callable without arguments that builds an ``nn.Module``, or its
    ``"package.module:name"``; ``data`` a Zarr dataset (URL, path or ``Dataset``); ``run_dir`` where
    the run lives, a path or ``s3://bucket/folder`` that every worker reaches, ``storage_options`` what
    fsspec needs to open it (a ``Dataset`` brings its own); ``loss(output, target)`` returns one loss per example,
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
        storage_options=storage_options,
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
    run._watch.forget()
    pubsub.open_variable(client, spec.variable)
    keys = {"learner": (f"learn-{spec.run}", spec.attempt), "coordinator": (f"coordinate-{spec.run}", spec.attempt)}
    keep(client, spec.run, spec.topic, spec.attempt, keys)
    learner = for_learner(workers)
    others = for_coordinator(workers, learner)
    with span(spec.topic):  # Dask's pages show the run as one thing
        futures = [
            client.submit(learn, spec, key=keys["learner"], pure=False, priority=10, **learner),
            client.submit(coordinate, spec, key=keys["coordinator"], pure=False, priority=20, **others),
        ]
    if spec.detach:
        fire_and_forget(futures)
    run._watch.own(*futures)
    run._data = spec.data
    return run


def attach(
    client: Client,
    run_dir: str | Path,
    model: models.ModelSource | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Watch and steer a run that another client started, on a cluster or on disk only."""
    directory = RunDirectory(str(run_dir), storage_options=storage_options)
    directory.document()
    return Run(client, directory, model)


class Run:
    """A run as its user sees it."""

    def __init__(self, client: Client, directory: RunDirectory, model: models.ModelSource | None) -> None:
        self.document = directory.document()
        self.name = str(self.document["run"])
        self.directory = directory
        self._client, self._model = client, model
        self._data: Dataset | None = None
        self._watch = Watch(client, directory, self.name, int(self.document["config"]["learning"]["steps"]))

    # Watching -------------------------------------------------------------------------------

    @property
    def latest(self) -> dict[str, Any]:
        """The newest values heard: step, loss, gain, steps_per_second, test_error and so on."""
        return self._watch.latest

    @property
    def status(self) -> str:
        """``"starting"``, ``"running"``, ``"paused"``, ``"finished"``, ``"stopped"`` or ``"failed"``."""
        return self._watch.status

    def watch(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """The newest values again and again, at least four times a second, until the run has ended.

        Raises WaitTimeout after ``timeout`` seconds, and NoLearnerWorkerError as ``wait`` does.
        """
        return self._watch.follow(_deadline(timeout))

    def wait(
        self,
        timeout: float | None = None,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        second_interrupt: float = 3.0,
    ) -> dict[str, Any]:
        """Wait for the end of the run, ``timeout`` seconds at most; its summary.

        ``progress`` is called with the latest values about twice a second; in a notebook the run
        shows itself. ``callbacks`` (``dask_isgd.callbacks``) log the run elsewhere. Ctrl-C stops the
        waiting, not the run; another one within ``second_interrupt`` seconds stops the run. Raises
        the error that ended the run, WaitTimeout otherwise. Raises NoLearnerWorkerError where no
        worker has been able to take the learner for ``isgd.cluster.timeout``: the run goes on once
        there is one, and can be waited for again.
        """
        try:
            with following(self, progress, callbacks) as follow:
                self._watch.wait(_deadline(timeout), follow)
        except KeyboardInterrupt:
            self._interrupted(second_interrupt)
            raise
        return self.summary()

    def _interrupted(self, seconds: float) -> None:
        if seconds <= 0 or self.status not in GOING:
            return
        try:
            print(f"run {self.name} goes on; Ctrl-C again within {seconds:g} s stops it", file=sys.stderr, flush=True)
            for _ in self.watch(seconds):
                pass
        except WaitTimeout:
            return
        except KeyboardInterrupt:
            print(f"run {self.name}: {self.stop()}; resume=True goes on with it", file=sys.stderr, flush=True)

    @property
    def history(self) -> xr.Dataset:
        """What the learner reported: one row every ``report_every`` steps, dimension ``report``."""
        return self.directory.read_history()

    @property
    def evaluations(self) -> xr.Dataset:
        """Loss and error on the validation data, one row for each version evaluated."""
        return self.directory.read_history("evaluation")

    def summary(self) -> dict[str, Any]:
        """The run in a few figures, from its directory."""
        return summarise(self.directory, self.latest.get("scored_examples"))

    def plot(self) -> Figure:
        """Loss, test error, variance and gain: a matplotlib figure."""
        from dask_isgd.plots import plot

        return plot(self.history, self.evaluations, title=f"run {self.name}")

    def hardest(self, k: int = 10, data: Dataset | None = None) -> Hardest:
        """The k heaviest examples: indices, weights, ages; with pictures and labels where ``data`` is at hand.

        A run that was started here knows its data; one that was attached is told.
        """
        weights = self.directory.open_weights()
        trained = self.directory.checkpoints().latest()
        step = max(int(self.latest["step"]), trained.step if trained is not None else 0)
        model = self.model() if trained is not None and self._model is not None else None
        return hardest(weights, k, step, data if data is not None else self._data, model)

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
        deadline = _deadline(config.seconds("cluster.timeout") if timeout is None else timeout)
        for _ in self._watch.follow(deadline):
            pass
        self._watch.wait_for_coordinator(deadline)
        return self.status

    def detach(self) -> None:
        """Leave a run that was started here to the cluster: it outlives this client, as with ``fit(detach=True)``."""
        fire_and_forget(self._watch.owned)

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


def summarise(directory: RunDirectory, scored: int | None = None) -> dict[str, Any]:
    """A run's figures from its directory; None where there is no figure.

    train_loss: mean of the unbiased estimates of the last tenth of the reports; test_error: share
    wrong of the whole validation data at the last version evaluated; variance: traces for one draw;
    scored: what the run's coordinator said, of which the directory knows nothing.
    """
    document = directory.document()
    history = directory.read_history()
    evaluations = directory.read_history("evaluation")
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
    uniform = bool(document["config"]["sampling"]["uniform"])
    error = float(evaluations["error"][-1]) if evaluations.sizes.get("report", 0) else math.nan
    return {
        "run": str(directory.url),
        "steps": step,
        "seconds": round(seconds, 3),
        "train_loss": last("loss", mean=True),
        "test_error": error if math.isfinite(error) else None,
        "variance": {kind: last(f"variance_{kind}", mean=True) for kind in ("ideal", "stale", "uniform")},
        "gain": last("gain", mean=True),
        "scored": 0 if uniform else scored,
        "steps_per_second": round(step / seconds, 3) if seconds else None,
        "sampling": "uniform" if uniform else "importance",
    }


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
