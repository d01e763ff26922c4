"""A cluster of processes on this machine, one of them the learner's."""

from __future__ import annotations

import logging
import os
from typing import Any

from distributed import Nanny, Scheduler, SpecCluster

from dask_isgd.errors import ConfigError
from dask_isgd.placement import LEARNER, SCORER


class LocalCluster(SpecCluster):
    """One worker with the resource ``learner`` and two threads, the rest scorers of one thread.

    ``n_workers``: workers in all, at least one; None: one a core, at least two. With a single
    worker the learner shares it with scoring. Everything listens on the loopback address only.

    >>> with LocalCluster(3) as cluster, cluster.get_client() as client:  # doctest: +SKIP
    ...     run = dask_isgd.fit(client, ...)
    """

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        dashboard_address: str | None = "127.0.0.1:0",
        silence_logs: int = logging.WARNING,
        **kwargs: Any,
    ) -> None:
        n_workers = max(2, os.cpu_count() or 1) if n_workers is None else n_workers
        if n_workers < 1:
            raise ConfigError(f"n_workers: got {n_workers}, wanted at least 1")
        cores = os.cpu_count() or 1
        # torch's threads spin while they wait; on a machine with fewer cores than threads that
        # costs each other's time slices, a hundredfold for small models
        quiet = {"OMP_WAIT_POLICY": "PASSIVE"}
        common = {"host": "127.0.0.1", "dashboard": False, "silence_logs": silence_logs, "memory_limit": 0}

        def worker(threads: int, resources: dict[str, float], torch_threads: int) -> dict[str, Any]:
            env = {**quiet, "DASK_ISGD__CLUSTER__LEARNER_THREADS": str(torch_threads)}
            return {"cls": Nanny, "options": {**common, "nthreads": threads, "resources": resources, "env": env}}

        learner = {LEARNER: 1.0, **({SCORER: 1.0} if n_workers == 1 else {})}
        learner_threads = max(1, cores - (n_workers - 1))
        workers = {"learner": worker(2, learner, learner_threads)}
        workers.update((f"scorer-{i}", worker(1, {SCORER: 1.0}, 1)) for i in range(n_workers - 1))
        scheduler = {
            "cls": Scheduler,
            "options": {
                "host": "127.0.0.1",
                "port": 0,
                "dashboard": dashboard_address is not None,
                "dashboard_address": dashboard_address,
            },
        }
        kwargs.setdefault("name", "isgd")
        super().__init__(workers=workers, scheduler=scheduler, silence_logs=silence_logs, **kwargs)  # type: ignore[no-untyped-call]
