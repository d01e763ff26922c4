"""Tell other tools of a run: TensorBoard, MLflow, Weights & Biases, or whatever has three methods.

    from dask_isgd.callbacks import TensorBoard
    run.wait(callbacks=[TensorBoard("logs")])

A callback runs on the client. It is fed from the run's history, not from events: every row comes
once, in order, also those that were written while nobody waited. To export a run that has ended,
attach to it and wait: it returns at once. Each tool is an extra, ``pip install dask_isgd[mlflow]``.
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
