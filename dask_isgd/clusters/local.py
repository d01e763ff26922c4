"""A cluster of processes on this machine, one of which is the learner's."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import dask.config
from distributed import Nanny, Scheduler, Security

import dask_isgd.config  # noqa: F401  # its defaults
from dask_isgd.clusters.base import LearnerCluster, learner_names
from dask_isgd.clusters.main_guard import require_main_guard
from dask_isgd.errors import ConfigError
from dask_isgd.runtime.allocator import WORKER_ENVIRONMENT
from dask_isgd.runtime.placement import LEARNER, SCORER

_CALM = "dask_isgd.clusters.calm_preload"
_PRELOAD = "dask_isgd.clusters.imports_preload"


class LocalCluster(LearnerCluster):
    """A cluster of one worker with the resource ``learner`` and two threads, and of scorers with one thread each.

    ``n_workers``: the total number of workers, at least one; None for one per core or per GPU, at least two.
    A single worker runs both the learner and the scoring. ``learners``: how many workers are learners, one
    per run that trains at the same time. ``gpus``: each process sees one of these, in turn; None for those
    that this process sees. ``scale`` and ``adapt`` count scorers. All servers listen on the loopback address
    only.

    >>> with LocalCluster(3) as cluster, cluster.get_client() as client:  # doctest: +SKIP
    ...     run = dask_isgd.fit(client, ...)
    """

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        learners: int = 1,
        gpus: Sequence[str | int] | None = None,
        dashboard_address: str | None = "127.0.0.1:0",
        silence_logs: int = logging.WARNING,
        **kwargs: Any,
    ) -> None:
        require_main_guard()
        self._gpus = [str(gpu) for gpu in (visible_gpus() if gpus is None else gpus)]
        cores = os.cpu_count() or 1
        if n_workers is None:
            n_workers = max(1 + learners, len(self._gpus) or cores)
        if n_workers < 1 or learners < 1 or n_workers < learners:
            raise ConfigError(
                f"got n_workers={n_workers} and learners={learners}, wanted at least one learner and as many workers"
            )
        self._n_learners, self._n_scorers, self._silence = learners, n_workers - learners, silence_logs
        if kwargs.get("security") is True:
            kwargs["security"] = Security.temporary()
        self._security = kwargs.get("security")
        scheduler = {
            "cls": Scheduler,
            "options": {
                "host": "127.0.0.1",
                "port": 0,
                "protocol": None if self._security is None else "tls://",
                "security": self._security,
                "dashboard": dashboard_address is not None,
                # without a page the scheduler still serves its metrics: not on the port of another cluster's dashboard
                "dashboard_address": dashboard_address or "127.0.0.1:0",
                "preload": [*dask.config.get("distributed.scheduler.preload"), "dask_isgd.dashboard", _CALM],
            },
        }
        kwargs.setdefault("name", f"isgd-{uuid.uuid4().hex[:8]}")  # Dask takes clusters of one name for the same
        super().__init__(
            worker=self._scorer(0),
            workers={f"{SCORER}-{i}": self._scorer(i) for i in range(n_workers - learners)},
            scheduler=scheduler,
            silence_logs=silence_logs,
            **kwargs,
        )

    def learner_specs(self) -> dict[str, dict[str, Any]]:
        resources = {LEARNER: 1.0, **({SCORER: 1.0} if self._n_scorers == 0 else {})}
        cores = (os.cpu_count() or 1) // self._n_learners or 1
        threads = max(1, cores - -(-self._n_scorers // self._n_learners))
        names = learner_names(LEARNER, self._n_learners)
        return {name: self._worker(place, 2, resources, threads, cores - threads) for place, name in enumerate(names)}

    def new_worker_spec(self) -> dict[str, dict[str, Any]]:
        number = next(i for i in itertools.count() if f"{SCORER}-{i}" not in self.worker_spec)
        return {f"{SCORER}-{number}": self._scorer(number)}

    def _scorer(self, number: int) -> dict[str, Any]:
        return self._worker(self._n_learners + number, 1, {SCORER: 1.0}, 1)

    def _worker(
        self, place: int, threads: int, resources: dict[str, float], torch_threads: int, spare: int = 0
    ) -> dict[str, Any]:
        env = dict(WORKER_ENVIRONMENT)
        # not through the environment: a nanny's worker prefers the nanny's configuration
        own = {"isgd": {"cluster": {"learner-threads": torch_threads, "spare-threads": spare}}}
        # with the rest of the section isgd: the nanny replaces whole sections
        config = dask.config.merge({"isgd": dask.config.get("isgd")}, own)
        if self._gpus:
            env["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
        options = {"host": "127.0.0.1", "dashboard": False, "silence_logs": self._silence, "memory_limit": 0}
        options["preload"] = [*dask.config.get("distributed.worker.preload"), _PRELOAD, _CALM]
        options["preload_nanny"] = [*dask.config.get("distributed.nanny.preload"), _CALM]
        if self._security is not None:
            options |= {"protocol": "tls://", "security": self._security}
        return {
            "cls": Nanny,
            "options": {**options, "nthreads": threads, "resources": resources, "env": env, "config": config},
        }


def _has_driver() -> bool:
    """Return whether this machine has a driver without which torch finds no GPU: NVIDIA's or AMD's."""
    if sys.platform != "linux":
        return sys.platform != "darwin"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/kfd")
    return True


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees: those in ``CUDA_VISIBLE_DEVICES``, otherwise all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    if not _has_driver():
        return []
    import torch  # late: it takes a second

    return [str(i) for i in range(torch.cuda.device_count())]
