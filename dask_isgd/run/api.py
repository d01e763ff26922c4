"""``fit`` and ``attach``: start a run, or open one that exists.

The client submits the two long tasks and then only watches; the run directory holds the entire state of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed import Client, fire_and_forget, span

from dask_isgd.checks.request import PreparedRun, RunRequest, prepare
from dask_isgd.checks.start import admit, keys_of, open_topic
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.coordinator.task import coordinate
from dask_isgd.core.loss import Loss
from dask_isgd.core.models import ModelSource
from dask_isgd.learner.task import learn
from dask_isgd.run.run import Run
from dask_isgd.runtime.placement import coordinator_placement, learner_placement, note_on_sharing
from dask_isgd.storage import RunDirectory

logger = logging.getLogger(__name__)


def fit(
    client: Client,
    model: ModelSource,
    data: Any,
    run_dir: str | Path,
    *,
    loss: Loss | str | None = None,
    learning: Learning,
    scoring: Scoring | None = None,
    sampling: Sampling | None = None,
    validation: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    detach: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Train a model by importance sampling on a Dask cluster; return once training has been submitted.

    ``model`` is a callable without arguments that builds an ``nn.Module``, or its name ``"package.module:name"``.
    ``data`` is a Zarr dataset: a URL, a path or a ``Dataset``; or an object in memory, such as arrays ``(x, y)``, a
    map-style ``torch.utils.data.Dataset`` or a frame, which is written once, as it is, beside ``run_dir``, if it is
    small (``dask_isgd.checks.data``); so is ``validation``. ``run_dir`` is the run directory, a path or
    ``s3://bucket/folder`` that every worker can reach; ``storage_options`` are obstore's, to open it (a
    ``Dataset`` has its own). ``loss(output, target)`` returns one loss per example, shape (B,); known by name are
    ``"cross_entropy"`` (the default), ``"mse"``, ``"bce"`` (with logits) and ``"huber"``. With ``detach`` the run
    outlives the client.

    Raises, before anything is submitted, the errors of ``dask_isgd.errors`` that apply to the settings, the data, the
    model, the run directory or the workers.
    """
    request = RunRequest(
        model=model,
        data=data,
        run_dir=run_dir,
        loss=loss,
        learning=learning,
        scoring=scoring or Scoring(),
        sampling=sampling or Sampling(),
        validation=validation,
        resume=resume,
        overwrite=overwrite,
        detach=detach,
        storage_options=storage_options or {},
    )
    return start(client, prepare(request))


def start(client: Client, prepared: PreparedRun) -> Run:
    """Check the cluster, create the run directory and submit the two long tasks of a run.

    Raises NoLearnerWorkerError, ClusterMismatchError, ConfigError or StorageFullError; a directory that was created is
    then removed.
    """
    workers, spec = admit(client, prepared), prepared.spec
    note = note_on_sharing(workers, feedback=spec.feedback_suffices) if spec.scores else None
    if note is not None:
        logger.info("run %s: the cluster has one worker: %s", spec.name, note)
    run = Run(client, spec.directory, spec.model)
    run._monitor.forget()
    keys = keys_of(spec)
    open_topic(client, spec, keys)
    learner = learner_placement(workers)
    coordinator = coordinator_placement(workers, learner)
    task = learn
    if spec.learning.learners != 1:  # only then: not every build of torch can form a group
        from dask_isgd.learner.group.task import learn_together as task
    with span(spec.topic):  # Dask's pages show the run as one unit
        futures = [
            client.submit(task, spec, key=keys["learner"], pure=False, priority=10, **learner),
            client.submit(coordinate, spec, key=keys["coordinator"], pure=False, priority=20, **coordinator),
        ]
    if spec.detach:
        fire_and_forget(futures)
    run._monitor.own(futures[0], futures[1], spec.attempt)
    run._data = spec.data
    return run


def attach(
    client: Client,
    run_dir: str | Path,
    model: ModelSource | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Return a run that another client started, to watch and control it; its cluster may no longer exist."""
    directory = RunDirectory(str(run_dir), storage_options=storage_options)
    directory.document()
    return Run(client, directory, model)
