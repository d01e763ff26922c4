"""A preload for workers: they import what the tasks of a run need while the client still prepares it.

Otherwise the first tasks import it, one after the other: torch, Zarr, this library and, on the learner's worker,
torch's compiler, which torch loads with the first step of an optimizer. The worker joins the cluster meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from dask_isgd.runtime.imports import exit_quickly, import_early
from dask_isgd.runtime.placement import LEARNER
from dask_isgd.runtime.task_errors import log_in_one_line

_GRACE = 0.3
"""Seconds for the process to end by itself."""
_ending: list[asyncio.Future[None]] = []
"""asyncio holds no reference to its tasks."""
_TASKS = ("dask_isgd.checks.cluster", "dask_isgd.coordinator.task", "dask_isgd.scorer.task")


def dask_setup(worker: Any) -> None:
    """Start to import; Dask calls this in the worker's process (``--preload dask_isgd.clusters.imports_preload``)."""
    log_in_one_line()
    if LEARNER in worker.state.total_resources:
        import_early(*_TASKS, "dask_isgd.learner.group.task", then=_step_once)
    else:
        import_early(*_TASKS)


async def dask_teardown(worker: Any) -> None:
    """Let the process end as soon as the worker has closed, whatever its threads still import, read or score.

    Nothing is lost: what is written is written atomically. Without this, the nanny complains and kills the process.
    """
    exit_quickly()
    if worker.nanny:
        _ending.append(asyncio.ensure_future(_end_once_closed(worker)))


async def _end_once_closed(worker: Any) -> None:
    await worker.finished()
    timer = threading.Timer(_GRACE, os._exit, (0,))
    timer.daemon = True  # it ends with the process if that is faster
    timer.start()


def _step_once() -> None:
    import torch

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
