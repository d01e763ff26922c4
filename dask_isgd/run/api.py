"""``fit`` and ``attach``: start a run, or find one again.

The client submits the two long tasks and then only watches; the run directory is the truth.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client, fire_and_forget, span

from dask_isgd.checks.cluster import check_cluster, wait_for_workers
from dask_isgd.checks.request import PreparedRun, check, create
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.coordinator.task import coordinate
from dask_isgd.core.loss import Loss
from dask_isgd.core.models import ModelSource
from dask_isgd.learner.task import learn
from dask_isgd.runtime.parameters import open_variable
from dask_isgd.runtime.placement import coordinator_placement, learner_placement
from dask_isgd.runtime.scheduler_plugin import guard_run
from dask_isgd.storage import Dataset, RunDirectory

if TYPE_CHECKING:
    pass
from dask_isgd.run.run import Run

logger = logging.getLogger(__name__)


def fit(
    client: Client,
    model: ModelSource,
    data: Dataset | str | Path,
    run_dir: str | Path,
    *,
    loss: Loss | None = None,
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
    plan = check(
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


def start(client: Client, plan: PreparedRun) -> Run:
    """Submit a run that has passed the checks which need no cluster."""
    workers = wait_for_workers(client)
    create(plan)
    try:
        workers = check_cluster(client, plan)
    except BaseException:
        if not plan.resume:
            plan.spec.directory.remove()
        raise
    spec = plan.spec
    if len(workers) == 1:
        logger.warning("run %s: the cluster has one worker; scoring shares it with the learner", spec.run)
    run = Run(client, spec.directory, spec.model)
    run._monitor.forget()
    open_variable(client, spec.variable)
    keys = {"learner": (f"learn-{spec.run}", spec.attempt), "coordinator": (f"coordinate-{spec.run}", spec.attempt)}
    guard_run(client, spec.run, spec.topic, spec.attempt, keys)
    learner = learner_placement(workers)
    others = coordinator_placement(workers, learner)
    with span(spec.topic):  # Dask's pages show the run as one thing
        futures = [
            client.submit(learn, spec, key=keys["learner"], pure=False, priority=10, **learner),
            client.submit(coordinate, spec, key=keys["coordinator"], pure=False, priority=20, **others),
        ]
    if spec.detach:
        fire_and_forget(futures)
    run._monitor.own(*futures)
    run._data = spec.data
    return run


def attach(
    client: Client,
    run_dir: str | Path,
    model: ModelSource | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """RunMonitor and steer a run that another client started, on a cluster or on disk only."""
    directory = RunDirectory(str(run_dir), storage_options=storage_options)
    directory.document()
    return Run(client, directory, model)
