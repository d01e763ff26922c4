"""Clusters of dask-jobqueue whose learner's job differs from the scorers' jobs.

``SLURMCluster``, ``PBSCluster``, ``SGECluster``, ``LSFCluster``, ``HTCondorCluster``, ``OARCluster`` and
``MoabCluster`` of this module are dask-jobqueue's classes, extended by :func:`with_learner`. They need the
extra ``jobqueue``: ``pip install 'dask_isgd[jobqueue]'``.

>>> cluster = SLURMCluster(                                                  # doctest: +SKIP
...     queue="cpu", cores=4, memory="8GB", walltime="04:00:00", n_workers=8,
...     learner={"queue": "gpu", "job_extra_directives": ["--gres=gpu:1"], "memory": "32GB"},
... )
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import dask.config
from distributed.deploy.spec import ProcessInterface

from dask_isgd.clusters.base import LearnerCluster, learner_names
from dask_isgd.errors import ConfigError
from dask_isgd.extras import needs
from dask_isgd.names import hint
from dask_isgd.runtime import dask_internals
from dask_isgd.runtime.allocator import EXPORT
from dask_isgd.runtime.placement import LEARNER, SCORER

QUEUES = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "htcondor": "HTCondorCluster",
    "oar": "OARCluster",
    "moab": "MoabCluster",
}
_PRELOAD = "dask_isgd.clusters.sigterm_preload"
_NOT_FOR_JOBS = {"self", "args", "kwargs", "scheduler", "name", "protocol", "security", "config_name"} | {
    *("extra", "job_extra", "env_extra", "header_skip", "project"),  # renamed by dask-jobqueue
}
_LOOPBACK = "127.0.0.1:8787"


def _plain(name: str) -> type[Any]:
    """Return dask-jobqueue's own class."""
    with needs("jobqueue", name):
        import dask_jobqueue
    return getattr(dask_jobqueue, name)  # type: ignore[no-any-return]


@functools.cache
def with_learner(kind: type[Any]) -> type[Any]:
    """Return a subclass of a ``JobQueueCluster`` class that submits learners' jobs beside the scorers' jobs.

    It takes the arguments of ``kind``, which describe a scorer's job, and:

    learner: a mapping of the arguments in which a learner's job differs: partition, memory, walltime,
        directives and so on; ``cores`` become its torch threads.
    learners: how many, one per run that trains at the same time.
    n_workers, ``scale``, ``adapt``: count scorers only.
    processes: of a scorer's job, 1 unless configured; its cores are divided among them as threads.

    Scorers declare the resource ``scorer``, one per thread; a learner declares ``learner``, has at least two
    threads, no memory limit from Dask (the queue's limit applies) and closes cleanly on SIGTERM. The
    dashboard listens on the loopback address unless ``scheduler_options`` override it.
    """

    class Cluster(kind, LearnerCluster):  # type: ignore[misc]
        __doc__ = f"{kind.__name__} with a learner's job of its own; see ``with_learner``."

        def __init__(
            self, n_workers: int = 0, *, learner: Mapping[str, Any] | None = None, learners: int = 1, **kwargs: Any
        ) -> None:
            if learners < 1:
                raise ConfigError(f"learners: got {learners}, wanted at least 1")
            self._learner_options, self._n_learners = dict(learner or {}), learners
            known = _options_of(kind.job_cls)
            for key in self._learner_options.keys() - known:
                raise ConfigError(f"learner: unknown key {key!r}; {hint(key, sorted(known))}")
            if self._learner_options.get("processes", 1) != 1:
                raise ConfigError("learner.processes: a learner is one process; for several learners set learners=…")
            section = f"jobqueue.{kwargs.get('config_name') or kind.job_cls.default_config_name()}"
            if kwargs.get("processes") is None:
                # explicit: dask-jobqueue otherwise loses track of which job its workers belong to
                kwargs["processes"] = dask.config.get(f"{section}.processes", None) or 1
            given = kwargs.get("scheduler_options")
            if given is None:
                given = dask.config.get(f"{section}.scheduler-options", {})
            preload = [*dask.config.get("distributed.scheduler.preload"), "dask_isgd.dashboard"]
            kwargs["scheduler_options"] = {"dashboard_address": _LOOPBACK, "preload": preload, **given}
            super().__init__(n_workers=n_workers, **kwargs)

        def learner_specs(self) -> dict[str, dict[str, Any]]:
            # the job's options are complete at this point, and the specification has not been read yet
            common, own = dask_internals.job_options(self), self._learner_options
            self._scorer_kwargs = self._as_scorer(common)
            self._learner_kwargs = self._as_learner({**common, **own, "processes": 1})
            common.update(self._scorer_kwargs)
            self.job_script(LEARNER)  # raises an error in its options before anything is submitted
            names = learner_names(LEARNER, self._n_learners)
            return {name: {"cls": self.job_cls, "options": self._learner_kwargs} for name in names}

        def _as_scorer(self, options: Mapping[str, Any]) -> dict[str, Any]:
            places = max(1, dask_internals.threads_per_process(self))
            return {
                **options,
                "job_script_prologue": [*self._prologue(options), EXPORT],
                "worker_extra_args": [*self._extra(options), "--resources", f"{SCORER}={places}"],
            }

        def _prologue(self, options: Mapping[str, Any]) -> list[str]:
            key = f"jobqueue.{self.job_cls.config_name}.job-script-prologue"
            return list(options.get("job_script_prologue") or dask.config.get(key, None) or [])

        def _as_learner(self, options: Mapping[str, Any]) -> dict[str, Any]:
            job = self.job_cls("tcp://…", name=LEARNER, **options)
            cores = max(1, job.worker_process_threads)
            section = f"jobqueue.{job.config_name}"
            python = options.get("python") or dask.config.get(f"{section}.python") or sys.executable
            return {
                **options,
                # the worker's command replaces the shell, so that it receives the queue's signals
                "python": python if python.startswith("exec ") else f"exec {python}",
                "job_script_prologue": [
                    *self._prologue(options),
                    EXPORT,
                    f"export DASK_ISGD__CLUSTER__LEARNER_THREADS={cores}",
                ],
                "worker_extra_args": [
                    *self._extra(options),
                    *("--resources", f"{LEARNER}=1", "--preload", _PRELOAD),
                    *("--nthreads", str(max(2, cores)), "--memory-limit", "0"),
                ],
            }

        def _extra(self, options: Mapping[str, Any]) -> list[str]:
            name = options.get("config_name") or self.job_cls.default_config_name()
            given = options.get("worker_extra_args")
            return list(dask.config.get(f"jobqueue.{name}.worker-extra-args") if given is None else given)

        @property
        def _learner_job(self) -> Any:
            scheduler = getattr(self, "scheduler", None)
            address = getattr(scheduler, "address", None) or "tcp://<insert-scheduler-address-here>:8786"
            return self.job_cls(address, name=LEARNER, **self._learner_kwargs)

        def on_closed(self) -> None:
            dask_internals.close_key_files(self)

        def job_script(self, role: str = SCORER) -> str:
            """Return the script of a ``"scorer"``'s or the ``"learner"``'s job."""
            if role not in (SCORER, LEARNER):
                raise ConfigError(f"role: got {role!r}, wanted {SCORER!r} or {LEARNER!r}")
            return str(self._learner_job.job_script() if role == LEARNER else super().job_script())

        def job_id(self, role: str = LEARNER) -> list[str]:
            """Return the queue's ids of the submitted jobs of a role, in the order of their names."""
            entries = sorted((n for n in self.workers if (n in self._learners) == (role == LEARNER)), key=str)
            return [str(self.workers[name].job_id) for name in entries if self.workers[name].job_id is not None]

    Cluster.__name__ = Cluster.__qualname__ = kind.__name__
    Cluster.__module__ = __name__
    return Cluster


def job_options(queue: str) -> set[str]:
    """Return the names of the options that a job of a queue (a key of ``QUEUES``) accepts."""
    return _options_of(_plain(QUEUES[queue]).job_cls)


def _options_of(job: type[Any]) -> set[str]:
    names = {
        name
        for base in job.__mro__
        if issubclass(base, ProcessInterface)
        for name, parameter in inspect.signature(base).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    return names - _NOT_FOR_JOBS


def __getattr__(name: str) -> Any:
    if name not in QUEUES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return with_learner(_plain(name))  # type: ignore[arg-type]
