"""A cluster of specified workers whose learners are left alone by ``scale`` and ``adapt``."""

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
"""Further timeouts after which a nanny is given up that still starts its worker."""


class LearnerCluster(SpecClusterHooks):
    """Adds the workers of :meth:`learner_specs`, which differ from those that are scaled.

    ``scale`` and ``adapt`` count scorers. What is lost, learner or scorer, is asked for again once it
    has been missing for ``distributed.deploy.lost-worker-timeout``: a bare ``SpecCluster`` does so for
    nobody. It stands last in a list of bases, right above ``SpecCluster``, so that what subclasses of
    ``SpecCluster`` make of ``scale`` (jobs, say) ends here.
    """

    def __init__(self, **kwargs: Any) -> None:
        try:
            self._learners = self.learner_specs()
        except BaseException:
            self.status = Status.closed  # nothing was started
            raise
        self._arrived: set[str] = set()
        self._due: dict[str, float] = {}
        """When each of those that are gone is given up, by the event loop's clock."""
        workers = {**self._learners, **(kwargs.pop("workers", None) or {})}
        super().__init__(workers=workers, **kwargs)  # type: ignore[no-untyped-call]

    def learner_specs(self) -> dict[str, dict[str, Any]]:
        """Specifications of the learners' workers by name, in the manner of ``SpecCluster``."""
        raise NotImplementedError

    # How many ---------------------------------------------------------------------------------

    def scale(self, n: int = 0, memory: Any = None, cores: int | None = None) -> Any:
        """Have ``n`` scorers, or as many as have that memory or those cores together."""
        if self.status in (Status.closing, Status.closed):
            return super().scale(n)  # type: ignore[no-untyped-call]
        if memory is not None:
            n = max(n, math.ceil(parse_bytes(memory) / dask_internals.memory_per_worker(self)))
        if cores is not None:
            n = max(n, math.ceil(cores / dask_internals.threads_per_worker(self)))
        scorers = [name for name in self.worker_spec if name not in self._learners]
        # those that wait in a queue go first, then the youngest; entries leave the specification one by
        # one, for the event loop's thread may look at it at any moment
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
        """Let the number of scorers follow the need: more while freshness pays, few while the gate is shut."""
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

    # What is lost -----------------------------------------------------------------------------

    def _workers_of(self, name: str) -> set[str]:
        """Names of the Dask workers of one entry: a job may hold several."""
        suffixes = self.worker_spec.get(name, {}).get("group")
        return {f"{name}{suffix}" for suffix in suffixes} if suffixes else {name}

    def _present(self) -> set[str]:
        """Entries of which a worker is on the cluster."""
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
            self._look_again(seconds)

    def _look_again(self, seconds: float) -> None:
        def look() -> None:
            dask_internals.keep_until_done(self, asyncio.ensure_future(self._replace()))

        asyncio.get_running_loop().call_later(seconds + _AFTER, look)

    async def _replace(self) -> None:
        """Ask again for what is specified and gone."""
        if self.status is not Status.running:
            return
        timeout = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
        now, gone = asyncio.get_running_loop().time(), self._arrived - self._present()
        for name in [n for n in gone if n in self.workers and n in self.worker_spec and now >= self._due.get(n, now)]:
            lost = self.workers[name]
            # a busy machine starts a process slowly
            if dask_internals.nanny_restarts(lost) and now < self._due.get(name, now) + _PATIENCE * timeout:
                self._look_again(timeout)
                continue
            self._arrived.discard(name)
            del self.workers[name]
            with contextlib.suppress(OSError, RuntimeError):
                await lost.close()
        try:
            await dask_internals.start_missing(self)
        except Exception as error:
            logger.warning("cluster %s: cannot start what was lost, trying again: %s", self.name, error)
            for name in [n for n, worker in self.workers.items() if worker.status is Status.created]:
                del self.workers[name]
            self._look_again(timeout)


def learner_names(prefix: str, count: int) -> list[str]:
    """Names of ``count`` learners: the bare prefix for the only one."""
    return [prefix] if count == 1 else [f"{prefix}-{i}" for i in range(count)]
