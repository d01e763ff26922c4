"""Clusters with a worker for the learner: on this machine, on a job queue, from a file.

Names load on first use: the classes of queues need dask-jobqueue, those of files the packages that the file names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dask_isgd.clusters.local import LocalCluster

if TYPE_CHECKING:
    from dask_isgd.clusters.adaptive import ScoreAdaptive as ScoreAdaptive
    from dask_isgd.clusters.cluster_file import ClusterConfig as ClusterConfig
    from dask_isgd.clusters.cluster_file import load_cluster as load_cluster
    from dask_isgd.clusters.jobqueue import with_learner as with_learner
    from dask_isgd.clusters.open import open_cluster as open_cluster
    from dask_isgd.clusters.scorer_controller import ScorerController as ScorerController

_QUEUES = ("SLURM", "PBS", "SGE", "LSF", "HTCondor", "OAR", "Moab")
_HOME = {
    "ScoreAdaptive": "adaptive",
    "ClusterConfig": "cluster_file",
    "load_cluster": "cluster_file",
    "open_cluster": "open",
    "ScorerController": "scorer_controller",
    "with_learner": "jobqueue",
    **{f"{name}Cluster": "jobqueue" for name in _QUEUES},
}

__all__ = ["LocalCluster", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
