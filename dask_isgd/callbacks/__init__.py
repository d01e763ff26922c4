"""Log a run to other tools: TensorBoard, MLflow, Weights & Biases, or any object with three methods.

    from dask_isgd.callbacks import TensorBoard
    run.wait(callbacks=[TensorBoard("logs")])

A callback runs on the client. It receives the run's history, not its events: every row once and in
order, including those that were written while nobody was waiting. To export a run that has ended, attach
to it and wait, which returns at once. Each tool is an extra: ``pip install 'dask_isgd[mlflow]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dask_isgd.callbacks.callback import Callback

if TYPE_CHECKING:
    from dask_isgd.callbacks.mlflow import MLflow as MLflow
    from dask_isgd.callbacks.tensorboard import TensorBoard as TensorBoard
    from dask_isgd.callbacks.wandb import WandB as WandB

__all__ = ["Callback", "MLflow", "TensorBoard", "WandB"]

_HOME = {"TensorBoard": "tensorboard", "MLflow": "mlflow", "WandB": "wandb"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
