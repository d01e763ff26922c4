"""``Run``: what the user holds to watch and steer a run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distributed import Client, fire_and_forget

from dask_isgd import config
from dask_isgd.callbacks import Callback
from dask_isgd.checks.monitor import GOING, RunMonitor
from dask_isgd.core import models
from dask_isgd.core.models import ModelSource
from dask_isgd.display.html import card
from dask_isgd.errors import CheckpointError, ConfigError
from dask_isgd.events import Control, topic_of
from dask_isgd.run.hardest import Hardest, hardest
from dask_isgd.run.interrupt import interrupted_again
from dask_isgd.run.progress import following
from dask_isgd.runtime import pubsub
from dask_isgd.storage import Dataset, RunDirectory

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure
    from torch import nn
from dask_isgd.run.summary import summarise


class Run:
    """A run as its user sees it."""

    def __init__(self, client: Client, directory: RunDirectory, model: ModelSource | None) -> None:
        self.document = directory.document()
        self.name = str(self.document["run"])
        self.directory = directory
        self._client, self._model = client, model
        self._data: Dataset | None = None
        self._monitor = RunMonitor(client, directory, self.name, int(self.document["config"]["learning"]["steps"]))

    # Watching -------------------------------------------------------------------------------

    @property
    def latest(self) -> dict[str, Any]:
        """The newest values heard: step, loss, gain, steps_per_second, validation_error and so on."""
        return self._monitor.latest

    @property
    def status(self) -> str:
        """``"starting"``, ``"running"``, ``"paused"``, ``"finished"``, ``"stopped"`` or ``"failed"``."""
        return self._monitor.status

    def watch(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """The newest values again and again, at least four times a second, until the run has ended.

        Raises WaitTimeoutError after ``timeout`` seconds, and NoLearnerWorkerError as ``wait`` does.
        """
        return self._monitor.follow(_deadline(timeout))

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
        the error that ended the run, WaitTimeoutError otherwise. Raises NoLearnerWorkerError where no
        worker has been able to take the learner for ``isgd.cluster.timeout``: the run goes on once
        there is one, and can be waited for again.
        """
        try:
            with following(self, progress, callbacks) as follow:
                self._monitor.wait(_deadline(timeout), follow)
        except KeyboardInterrupt:
            self._interrupted(second_interrupt)
            raise
        return self.summary()

    def _interrupted(self, seconds: float) -> None:
        if seconds <= 0 or self.status not in GOING:
            return
        message = f"run {self.name} continues; press Ctrl-C again within {seconds:g} s to stop it"
        if interrupted_again(self, seconds, message):
            print(f"run {self.name}: {self.stop()}; resume=True resumes it", file=sys.stderr, flush=True)

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
        return summarise(self.directory, self.latest.get("examples_scored"))

    def plot(self) -> Figure:
        """Loss, validation error, variance and gain: a matplotlib figure."""
        from dask_isgd.display.plots import plot

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
        return card(self.name, self.status, self.latest)

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
        for _ in self._monitor.follow(deadline):
            pass
        self._monitor.wait_for_coordinator(deadline)
        return self.status

    def detach(self) -> None:
        """Leave a run that was started here to the cluster: it outlives this client, as with ``fit(detach=True)``."""
        fire_and_forget(self._monitor.owned)

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


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
