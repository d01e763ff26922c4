"""A preload for workers: they import what the tasks of a run need while the client still prepares it.

Otherwise the first tasks import it, one after the other: torch, Zarr, this library and, on the learner's worker,
torch's compiler, which torch loads with the first step of an optimizer. The worker joins the cluster meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any

from dask_isgd.runtime.imports import exit_quickly, import_early, wait_for_imports
from dask_isgd.runtime.placement import LEARNER

_TASKS = ("dask_isgd.checks.cluster", "dask_isgd.coordinator.task", "dask_isgd.scorer.task")


def dask_setup(worker: Any) -> None:
    """Start to import; Dask calls this in the worker's process (``--preload dask_isgd.clusters.imports_preload``)."""
    if LEARNER in worker.state.total_resources:
        import_early(*_TASKS, "dask_isgd.learner.task", then=_step_once)
    else:
        import_early(*_TASKS)


async def dask_teardown(worker: Any) -> None:
    """Let the process end quickly, but not in the middle of an import."""
    await asyncio.to_thread(wait_for_imports)
    exit_quickly()


def _step_once() -> None:
    import torch

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
