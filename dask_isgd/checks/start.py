"""What every start of a run does on its cluster before it submits a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distributed import Client

from dask_isgd.checks.cluster import check_cluster, wait_for_workers
from dask_isgd.checks.request import PreparedRun, begin, create
from dask_isgd.core.spec import RunSpec
from dask_isgd.events import Control
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.parameters import open_variable
from dask_isgd.runtime.scheduler_plugin import guard_run

Keys = Mapping[str, tuple[str, int]]
"""The keys of a run's long tasks by role."""


def admit(client: Client, prepared: PreparedRun) -> dict[str, Mapping[str, Any]]:
    """Create the run directory, check the cluster and record this start of the run; return the workers.

    Raises NoLearnerWorkerError, ClusterMismatchError, ConfigError or StorageFullError; a directory that was created is
    then removed.
    """
    wait_for_workers(client, prepared.spec.learning.learners, external=prepared.spec.external)
    create(prepared)
    try:
        workers = check_cluster(client, prepared)
    except BaseException:
        if not prepared.resume:
            prepared.spec.directory.remove()
        raise
    begin(prepared)
    return workers


def keys_of(spec: RunSpec) -> Keys:
    """Return the keys of the run's long tasks: a loop outside the cluster is none."""
    keys = {"learner": (f"learn-{spec.run}", spec.attempt), "coordinator": (f"coordinate-{spec.run}", spec.attempt)}
    return {role: key for role, key in keys.items() if role != "learner" or not spec.external}


def open_topic(client: Client, spec: RunSpec, keys: Keys) -> None:
    """Open the run's Variable and topic, and guard its tasks; an earlier start that still runs commits and leaves."""
    open_variable(client, spec.variable)
    pubsub.announce(client, spec.topic, Control(run=spec.run, incarnation=0, attempt=spec.attempt, want="run"))
    guard_run(client, spec.run, spec.topic, spec.attempt, keys)
