"""A cluster of specified workers in which ``scale`` and ``adapt`` leave the learners alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterable
from typing import Any

import dask.config
from dask.utils import parse_bytes, parse_timedelta
from distributed import Adaptive, Status

from dask_isgd.clusters.adaptive import ScoreAdaptive
from dask_isgd.runtime import dask_internals
from dask_isgd.runtime.dask_internals import SpecClusterHooks

logger = logging.getLogger(__name__)

_AFTER = 0.1
_PATIENCE = 8
"""The number of further timeouts that a nanny may take to restart its worker before it is replaced."""


class LearnerCluster(SpecClusterHooks):
    """A cluster with the workers of :meth:`learner_specs` beside the scorers that are scaled.

    ``scale`` and ``adapt`` count scorers. A lost worker, learner or scorer, is started again once it has
    been missing for ``distributed.deploy.lost-worker-timeout``; a plain ``SpecCluster`` does not do that.
    This class must be the last base, right above ``SpecCluster``, so that ``scale`` of its subclasses
    (which counts jobs, for example) ends here.
    """

    def __init__(self, **kwargs: Any) -> None:
        try:
            self._learners = self.learner_specs()
        except BaseException:
            self.status = Status.closed  # nothing was started
            raise
        self._arrived: set[str] = set()
        self._due: dict[str, float] = {}
        """When each missing entry is replaced, by the event loop's clock."""
        workers = {**self._learners, **(kwargs.pop("workers", None) or {})}
        super().__init__(workers=workers, **kwargs)  # type: ignore[no-untyped-call]

    def learner_specs(self) -> dict[str, dict[str, Any]]:
        """Return the specifications of the learners' workers by name, as ``SpecCluster`` expects them."""
        raise NotImplementedError

    # Scaling ----------------------------------------------------------------------------------

    def scale(self, n: int = 0, memory: Any = None, cores: int | None = None) -> Any:
        """Scale to ``n`` scorers, or to as many as have that memory or those cores together."""
        if self.status in (Status.closing, Status.closed):
            return super().scale(n)  # type: ignore[no-untyped-call]
        if memory is not None:
            n = max(n, math.ceil(parse_bytes(memory) / dask_internals.memory_per_worker(self)))
        if cores is not None:
            n = max(n, math.ceil(cores / dask_internals.threads_per_worker(self)))
        scorers = [name for name in self.worker_spec if name not in self._learners]
        # those that wait in a queue are removed first, then the youngest; entries are deleted one by one,
        # because the event loop's thread may read the specification at any moment
        arrived = self._present()
        youngest_first = list(reversed(scorers))
        for name in sorted(youngest_first, key=lambda name: name in arrived)[: max(0, len(scorers) - n)]:
            del self.worker_spec[name]
        for _ in range(n - len(scorers)):
            self.worker_spec.update(self.new_worker_spec())  # type: ignore[no-untyped-call]
        return dask_internals.start_missing_soon(self)

    async def scale_down(self, workers: Iterable[str]) -> None:
        await super().scale_down({w for w in workers if w not in self._learners})  # type: ignore[no-untyped-call]

    def adapt(self, Adaptive: type[Adaptive] = ScoreAdaptive, **kwargs: Any) -> Adaptive:  # type: ignore[override]
        """Adapt the number of scorers: more while fresher weights raise the gain, few while the gate is closed."""
        return super().adapt(Adaptive=Adaptive, **kwargs)

    @property
    def plan(self) -> set[str]:
        return self._scorers(super().plan)

    @property
    def requested(self) -> set[str]:
        return self._scorers(super().requested)

    @property
    def observed(self) -> set[str]:
        return self._scorers(super().observed)

    def _scorers(self, names: set[str]) -> set[str]:
        return {name for name in names if name not in self._learners}

    # Replacing lost workers -------------------------------------------------------------------

    def _workers_of(self, name: str) -> set[str]:
        """Return the names of the Dask workers of one entry: a job may have several."""
        suffixes = self.worker_spec.get(name, {}).get("group")
        return {f"{name}{suffix}" for suffix in suffixes} if suffixes else {name}

    def _present(self) -> set[str]:
        """Return the entries that have a worker on the cluster."""
        seen = {info["name"] for info in self.scheduler_info["workers"].values()}
        return {name for name in self.worker_spec if self._workers_of(name) & seen}

    def on_workers_changed(self, removed: bool) -> None:
        present = self._present()
        self._arrived |= present
        self._due = {name: due for name, due in self._due.items() if name not in present}
        if removed:
            seconds = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
            due = asyncio.get_running_loop().time() + seconds
            self._due = dict.fromkeys(self._arrived - present, due) | self._due
            self._check_later(seconds)

    def _check_later(self, seconds: float) -> None:
        def check() -> None:
            dask_internals.keep_until_done(self, asyncio.ensure_future(self._replace()))

        asyncio.get_running_loop().call_later(seconds + _AFTER, check)

    async def _replace(self) -> None:
        """Start again what is specified and missing."""
        if self.status is not Status.running:
            return
        timeout = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
        now, gone = asyncio.get_running_loop().time(), self._arrived - self._present()
        for name in [n for n in gone if n in self.workers and n in self.worker_spec and now >= self._due.get(n, now)]:
            lost = self.workers[name]
            # a busy machine starts processes slowly
            if dask_internals.nanny_restarts(lost) and now < self._due.get(name, now) + _PATIENCE * timeout:
                self._check_later(timeout)
                continue
            self._arrived.discard(name)
            del self.workers[name]
            with contextlib.suppress(OSError, RuntimeError):
                await lost.close()
        try:
            await dask_internals.start_missing(self)
        except Exception as error:
            logger.warning("cluster %s: cannot replace lost workers (%s); trying again", self.name, error)
            for name in [n for n, worker in self.workers.items() if worker.status is Status.created]:
                del self.workers[name]
            self._check_later(timeout)


def learner_names(prefix: str, count: int) -> list[str]:
    """Return the names of ``count`` learners: the bare prefix if there is only one."""
    return [prefix] if count == 1 else [f"{prefix}-{i}" for i in range(count)]
