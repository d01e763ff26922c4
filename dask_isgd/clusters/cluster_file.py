"""A cluster in a file: ``cluster.yaml``, checked completely before anything is started.

``docs/clusters.md`` explains the keys, ``examples/clusters/`` has a file for each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.config

from dask_isgd.clusters.cluster_schema import MODELS, Queue
from dask_isgd.clusters.jobqueue import QUEUES, job_options
from dask_isgd.errors import ConfigError
from dask_isgd.names import hint, hyphenated, keys_underscored, nearest
from dask_isgd.validation import Places, validate
from dask_isgd.yaml_file import read_yaml

KINDS = (*MODELS, *QUEUES)
LIFETIME = ("lifetime", "lifetime_stagger")
"""Options of a job besides dask-jobqueue's: they become arguments of its worker."""
_QUEUE_WAIT = 3600.0
_ROLES = ("job", "learner", "scorer")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The cluster that a ``cluster.yaml`` describes; made by :func:`load_cluster`."""

    kind: str
    """``local``, ``scheduler``, ``dask-cuda`` or the name of a queue."""
    scorers: int | None = None
    """Scorers at the start (on a queue: scorers' jobs); None: the kind's default."""
    adapt: tuple[int, int] | None = None
    """Least and most scorers, if their number adapts to the run; None: it is fixed."""
    learners: int = 1
    """Workers for learners: one for each run that trains at the same time."""
    job: Mapping[str, Any] = field(default_factory=dict)
    """Options of every job, as dask-jobqueue spells them."""
    learner: Mapping[str, Any] = field(default_factory=dict)
    """Options in which the learner's job differs."""
    scorer: Mapping[str, Any] = field(default_factory=dict)
    """Options in which the scorers' jobs differ."""
    address: str | None = None
    scheduler_file: str | None = None
    gpus: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``LocalCUDACluster``."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Options of the scheduler that runs in this process: host, port, interface, dashboard_address."""
    security: str | Mapping[str, str] | None = None
    """``"temporary"`` or paths: ca_file, cert, key."""
    shared_directory: str | None = None
    dask: Mapping[str, Any] = field(default_factory=dict)
    """Dask configuration, here and on the workers that are started."""
    wait: float | None = None
    """Seconds to wait for the learner's worker, at the start and after a loss; None: ``isgd.cluster.timeout``."""


def load_cluster(path: str | Path) -> ClusterConfig:
    """Return the cluster that a YAML file describes. Raises ConfigError that lists every mistake in it."""
    content = read_yaml(path, "a cluster")
    try:
        return cluster_from_mapping(content)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def cluster_from_mapping(content: Any) -> ClusterConfig:
    """Return a cluster from plain values, as :func:`load_cluster` reads them."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"got {type(content).__name__}, wanted a mapping with the key cluster")
    given = keys_underscored(content)
    kind = given.get("cluster")
    if kind not in KINDS:
        close = nearest(str(kind), KINDS)
        suggestion = f"; did you mean {close!r}?" if close is not None else ""
        raise ConfigError(f"cluster: got {kind!r}, wanted one of {', '.join(KINDS)}{suggestion}")
    also = [*_unknown_options(kind, given), *_contradictions(kind, given)]
    values = validate(MODELS.get(kind, Queue), given, Places(spell=hyphenated), also).given()
    del values["cluster"]
    scorers = values.pop("scorers", None)
    if isinstance(scorers, Mapping):
        values["adapt"] = (scorers.get("minimum", 0), scorers["maximum"])
        scorers = scorers.get("minimum", 0)
    if kind in QUEUES:
        values.setdefault("wait", _QUEUE_WAIT)
    return ClusterConfig(kind=kind, scorers=scorers, **values)


def _jobs(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    parts = {role: given.get(role) for role in _ROLES}
    return {role: keys_underscored(part) if isinstance(part, Mapping) else {} for role, part in parts.items()}


def _unknown_options(kind: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Unknown options of a queue's jobs. dask-jobqueue loads its defaults into Dask's configuration on import."""
    if kind not in QUEUES:
        return
    known = [hyphenated(name) for name in sorted({*job_options(kind), *LIFETIME})]
    for role, options in _jobs(given).items():
        for key in map(hyphenated, options):
            if key not in known:
                yield f"{role}: unknown key {key!r}; {hint(key, known)}"


def _contradictions(kind: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Mistakes in keys that are each valid by themselves."""
    if kind == "scheduler" and ("address" in given) == ("scheduler_file" in given):
        yield "address: wanted this, as in tcp://10.0.0.1:8786, or scheduler-file, not both"
    if kind not in QUEUES:
        return
    jobs = _jobs(given)
    for need in ("cores", "memory", *(["disk"] if kind == "htcondor" else [])):
        if need not in jobs["job"] and dask.config.get(f"jobqueue.{kind}.{need}", None) is None:
            for role in ("learner", "scorer"):
                if need not in jobs[role]:
                    yield f"{role}.{need}: got nothing, wanted it here or under job"
    if jobs["learner"].get("processes", 1) != 1:
        yield "learner.processes: a learner is one process; for several runs at a time write learners: 2"
    if given.get("security") == "temporary" and "shared_directory" not in given:
        yield "shared-directory: wanted with security: temporary; the jobs read their keys there"
