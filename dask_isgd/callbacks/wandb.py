"""Runs in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask_isgd.callbacks.callback import Callback, require


class WandB(Callback):
    """Logs to a run of a project; ``settings`` go to ``wandb.init``: ``mode="offline"``, ``dir``, ``entity``."""

    def __init__(self, project: str = "dask_isgd", **settings: Any) -> None:
        self._wandb = require("wandb", "wandb")
        self.project, self.settings = project, settings
        self._run: Any = None

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(project=self.project, name=run, config=dict(settings), **self.settings)
        self._run.define_metric("*", step_metric="trained_steps")

    def report(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "trained_steps": step})

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({"status": status, **{k: v for k, v in summary.items() if v is not None}})
        self._run.finish(exit_code=1 if status == "failed" else 0)
