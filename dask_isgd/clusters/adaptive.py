"""Adaptive scaling of the scorers by what their scores bring, not by how many tasks wait."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from typing import Any

from distributed import Adaptive, SchedulerPlugin

from dask_isgd.clusters.scorer_controller import Need, Pays

_SILENT = 120.0


class _Listener(SchedulerPlugin):
    """The newest progress of every run of a scheduler in this process."""

    def __init__(self) -> None:
        self.name = f"isgd-need-{uuid.uuid4().hex[:8]}"
        self.runs: dict[str, tuple[float, Pays]] = {}

    def log_event(self, topic: str, message: Any) -> None:
        if not (topic.startswith("isgd-") and isinstance(message, dict)):
            return
        run, kind = str(message.get("run")), message.get("kind")
        if kind == "progress":
            values = message.get("values") or {}
            pays = Pays(
                open=bool(message.get("open")),
                gain=float(values.get("gain", math.nan)),
                ideal=float(values.get("ideal_gain", math.nan)),
            )
            self.runs[run] = time.monotonic(), pays
        elif kind == "ended" and message.get("role") == "learner":
            self.runs.pop(run, None)

    def heard(self) -> list[Pays]:
        now = time.monotonic()
        return [pays for when, pays in self.runs.values() if now - when < _SILENT]


class ScoreAdaptive(Adaptive):
    """Dask's ``Adaptive`` for a :class:`~dask_isgd.clusters.base.LearnerCluster` cluster.

    While runs report, their gains decide (:class:`~dask_isgd.clusters.scorer_controller.Need`); otherwise Dask's own
    estimate does. A coordinator keeps a bounded number of tasks in flight, so that the length of the
    queue, by which Dask judges, would say the same of any number of scorers.
    """

    def __init__(self, cluster: Any, *, need: Need | None = None, **kwargs: Any) -> None:
        self.need = need or Need()
        self._scheduler = cluster.scheduler
        self._listener = _Listener()
        self._scheduler.add_plugin(self._listener)
        super().__init__(cluster, **kwargs)

    def stop(self, reason: str = "unknown") -> None:
        if self.state in ("starting", "running"):
            with contextlib.suppress(ValueError):  # the scheduler has dropped it
                self._scheduler.remove_plugin(self._listener.name)
        super().stop(reason)

    async def target(self) -> int:
        runs = self._listener.heard()
        if not runs:
            estimate = await super().target()  # type: ignore[no-untyped-call]
            return max(0, int(estimate) - self._learners)
        return self.need.wanted(time.monotonic(), len(self.plan), runs)

    @property
    def _learners(self) -> int:
        return len(self._scheduler.workers) - len(self.observed)

    async def workers_to_close(self, target: int) -> list[str]:
        surplus = len(self.observed) - target
        if surplus <= 0:
            return []
        # the scheduler picks among all workers; learners it picks are passed over
        names = await self.scheduler.workers_to_close(n=surplus + self._learners, attribute="name")
        return [name for name in names if name in self.observed][:surplus]
