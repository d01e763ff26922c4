"""Runs in MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dask_isgd.callbacks.callback import Callback, require

_BATCH = 1000  # metrics per request: MLflow's own limit
_LIMIT = 500  # characters of a parameter


class MLflow(Callback):
    """Logs to a run of an MLflow experiment: settings as parameters, the history as metrics by step.

    ``tracking_uri``: None for MLflow's default. ``run_id`` is set when the run begins.
    """

    def __init__(self, experiment: str = "dask_isgd", *, tracking_uri: str | None = None) -> None:
        self._mlflow = require("mlflow", "mlflow")
        self._entities = require("mlflow.entities", "mlflow")
        self.experiment, self.tracking_uri = experiment, tracking_uri
        self.run_id: str | None = None
        self._client: Any = None
        self._waiting: list[Any] = []

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        self._client = self._mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        found = self._client.get_experiment_by_name(self.experiment)
        number = found.experiment_id if found is not None else self._client.create_experiment(self.experiment)
        self.run_id = self._client.create_run(number, run_name=run, tags={"dask_isgd.run": run}).info.run_id
        for name, value in settings.items():
            self._client.log_param(self.run_id, name, str(value)[:_LIMIT])

    def report(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._waiting += [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        while len(self._waiting) >= _BATCH:
            self._send()

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        while self._waiting:
            self._send()
        self._client.set_tag(self.run_id, "dask_isgd.status", status)
        outcome = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}.get(status, "KILLED")
        self._client.set_terminated(self.run_id, outcome)

    def _send(self) -> None:
        batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
        self._client.log_batch(self.run_id, metrics=batch)
