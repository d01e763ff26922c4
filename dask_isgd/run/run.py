"""``Run``, the object with which a user watches and controls a run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from distributed import Client, fire_and_forget

from dask_isgd import config
from dask_isgd.callbacks import Callback
from dask_isgd.checks.monitor import GOING, RunMonitor
from dask_isgd.core import models
from dask_isgd.core.models import ModelSource
from dask_isgd.display.html import card
from dask_isgd.display.text import steps_of
from dask_isgd.errors import CheckpointError, ConfigError
from dask_isgd.events import Control, topic_of
from dask_isgd.run.hardest import Hardest, hardest
from dask_isgd.run.interrupt import next_interrupt
from dask_isgd.run.progress import progress_calls
from dask_isgd.run.summary import final_values, summarise
from dask_isgd.runtime import pubsub
from dask_isgd.storage import Dataset, RunDirectory

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure
    from torch import nn


class Run:
    """A run: its status, its results, and the methods that control it."""

    def __init__(self, client: Client, directory: RunDirectory, model: ModelSource | None) -> None:
        self.document = directory.document("run", "config.learning.steps")
        self.id = str(self.document["run"])
        """Unique among all runs of a cluster; keys and topics of Dask contain it."""
        self.name = directory.name
        """What people call the run: the name of its directory."""
        self.directory = directory
        self._client, self._model = client, model
        self._data: Dataset | None = None
        self._monitor = RunMonitor(client, directory, self.id, int(self.document["config"]["learning"]["steps"]))

    @property
    def dashboard_link(self) -> str:
        """The link to the run's page on the dashboard of its cluster."""
        return f"{str(self._client.dashboard_link).removesuffix('/status')}/isgd?run={quote(self.id)}"

    # Watching -------------------------------------------------------------------------------

    @property
    def latest(self) -> dict[str, Any]:
        """The latest values received: step, loss, gain, steps_per_second, validation_error and so on.

        After ``wait`` they are those of the summary.
        """
        return self._monitor.latest

    @property
    def status(self) -> str:
        """``"starting"``, ``"running"``, ``"paused"``, ``"finished"``, ``"stopped"`` or ``"failed"``."""
        return self._monitor.status

    def watch(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield the latest values at least four times per second until the run has ended.

        Raises WaitTimeoutError after ``timeout`` seconds, and NoLearnerWorkerError as ``wait`` does.
        """
        return self._monitor.follow(_deadline(timeout))

    def wait(
        self,
        timeout: float | None = None,
        progress: Callable[[Mapping[str, Any]], None] | bool = True,
        *,
        callbacks: Sequence[Callback] = (),
        second_interrupt: float = 3.0,
    ) -> dict[str, Any]:
        """Wait for the end of the run, at most ``timeout`` seconds; return its summary.

        ``progress`` is called with the latest values about twice per second, and at the end with those of the summary
        and the ``status``. True shows the card of the run in a notebook and a bar or lines on stderr elsewhere; False
        shows nothing. ``callbacks`` (``dask_isgd.callbacks``) log the run elsewhere. Ctrl-C stops the waiting, not the
        run; another one within ``second_interrupt`` seconds stops the run. Raises the error that ended the run;
        WaitTimeoutError after ``timeout``; NoLearnerWorkerError if no worker has been able to run the learner for
        ``isgd.cluster.timeout``: the run continues as soon as there is one, and ``wait`` can be called again.
        """
        try:
            with progress_calls(self, progress, callbacks) as call:
                self._monitor.wait(_deadline(timeout), call)
                summary = self.summary()
                self._monitor.conclude(final_values(summary))
                if call is not None:
                    call({**self.latest, "status": self.status})
        except KeyboardInterrupt:
            self._stop_if_interrupted(second_interrupt)
            raise
        return summary

    def _stop_if_interrupted(self, seconds: float) -> None:
        if seconds <= 0 or self.status not in GOING:
            return
        message = f"run {self.name} continues; press Ctrl-C again within {seconds:g} s to stop it"
        if next_interrupt(self, seconds, message) is not None:
            print(f"run {self.name}: {self.stop()}; pass resume=True to resume it", file=sys.stderr, flush=True)

    @property
    def history(self) -> xr.Dataset:
        """The learner's reports: one row every ``report_every`` steps, dimension ``report``."""
        return self.directory.read_history()

    @property
    def evaluations(self) -> xr.Dataset:
        """Loss and error on the validation data, one row per evaluated version."""
        return self.directory.read_history("evaluation")

    def summary(self) -> dict[str, Any]:
        """Return the summary of the run, read from its directory."""
        return summarise(self.directory, self.latest.get("examples_scored"))

    def plot(self) -> Figure:
        """Return a matplotlib figure of loss, validation error, variance and gain."""
        from dask_isgd.display.plots import plot

        return plot(self.history, self.evaluations, title=self.name)

    def hardest(self, k: int = 10, data: Dataset | None = None) -> Hardest:
        """Return the k heaviest examples: indices, weights, ages; with ``data`` also images and labels.

        Only a run that ``attach`` returned needs ``data``; ``fit`` remembers it.
        """
        weights = self.directory.open_weights()
        trained = self.directory.checkpoints().latest()
        step = max(int(self.latest["step"]), trained.step if trained is not None else 0)
        model = self.model() if trained is not None and self._model is not None else None
        return hardest(weights, k, step, data if data is not None else self._data, model)

    def __repr__(self) -> str:
        latest = self.latest
        return f"<Run {self.name}: {self.status}, {steps_of(latest)}>"

    def _repr_html_(self) -> str:
        return card(self.name, self.status, self.latest)

    # Control --------------------------------------------------------------------------------

    def pause(self) -> None:
        """Commit a checkpoint and pause; the workers stay."""
        self._request("pause")

    def unpause(self) -> None:
        """Continue after ``pause``."""
        self._request("run")

    def stop(self, timeout: float | None = None) -> str:
        """Commit a checkpoint and end the run; wait for its end and return the status."""
        self._request("stop")
        deadline = _deadline(config.seconds("cluster.timeout") if timeout is None else timeout)
        for _ in self._monitor.follow(deadline):
            pass
        self._monitor.wait_for_coordinator(deadline)
        return self.status

    def detach(self) -> None:
        """Let a run that was started here outlive this client, as with ``fit(detach=True)``."""
        fire_and_forget(self._monitor.owned)

    def _request(self, state: str) -> None:
        self.directory.set_control(want=state)
        attempt = self.directory.attempt()
        control = Control(run=self.id, incarnation=0, attempt=attempt, want=state)
        pubsub.announce(self._client, topic_of(self.id), control)

    def model(self) -> nn.Module:
        """Return the model with the parameters of the latest checkpoint, in eval mode."""
        if self._model is None:
            raise ConfigError(
                f"run {self.name} was attached without a model; pass it: attach(client, run_dir, model=…), "
                f"the model it was trained with ({self.document['model']['name']})"
            )
        found = self.directory.checkpoints().latest()
        if found is None:
            raise CheckpointError(f"run {self.name} has no checkpoint yet; wait for the first one, or stop the run")
        tensors = models.from_arrays(found.tensors, found.state["dtypes"])
        module = models.build(self._model)
        models.load(module, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        return module.eval()


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
