"""Adaptive scaling of the scorers by the gain of their scores, not by the length of the queue."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from typing import Any

from distributed import Adaptive, SchedulerPlugin

from dask_isgd.clusters.scorer_controller import GainReport, ScorerController
from dask_isgd.display.latest_values import LEARNER, LatestValues
from dask_isgd.events import Ended, Progress, parse, topic_of

_SILENT = 120.0


class _GainListener(SchedulerPlugin):
    """The latest gain of every run of a scheduler in this process."""

    def __init__(self) -> None:
        self.name = f"isgd-gain-{uuid.uuid4().hex[:8]}"
        self._runs: dict[str, tuple[float, LatestValues]] = {}

    def log_event(self, topic: str, message: Any) -> None:
        event = parse(message)
        if event is None or topic != topic_of(event.run):
            return
        if isinstance(event, Ended) and event.role == LEARNER:
            self._runs.pop(event.run, None)
        elif isinstance(event, Progress):
            _, latest = self._runs.get(event.run, (0.0, LatestValues()))
            latest.apply(event)
            self._runs[event.run] = time.monotonic(), latest

    def reports(self) -> list[GainReport]:
        """Return the latest reports of the runs that have sent one within the last two minutes."""
        now = time.monotonic()
        self._runs = {run: entry for run, entry in self._runs.items() if now - entry[0] < _SILENT}
        rows = [latest.values for _, latest in self._runs.values()]
        return [
            GainReport(open=row["gate"], gain=row.get("gain", math.nan), ideal=row.get("ideal_gain", math.nan))
            for row in rows
        ]


class ScoreAdaptive(Adaptive):
    """Dask's ``Adaptive`` for a :class:`~dask_isgd.clusters.base.LearnerCluster`.

    While runs report, their gains decide (:class:`~dask_isgd.clusters.scorer_controller.ScorerController`);
    otherwise Dask's own estimate does. A coordinator keeps a bounded number of tasks in flight, so the length
    of the queue, which Dask goes by, is the same for any number of scorers.
    """

    def __init__(self, cluster: Any, *, controller: ScorerController | None = None, **kwargs: Any) -> None:
        self.controller = controller or ScorerController()
        self._scheduler = cluster.scheduler
        self._listener = _GainListener()
        self._scheduler.add_plugin(self._listener)
        super().__init__(cluster, **kwargs)

    def stop(self, reason: str = "unknown") -> None:
        if self.state in ("starting", "running"):
            with contextlib.suppress(ValueError):  # the scheduler has already removed it
                self._scheduler.remove_plugin(self._listener.name)
        super().stop(reason)

    async def target(self) -> int:
        reports = self._listener.reports()
        if not reports:
            estimate = await super().target()  # type: ignore[no-untyped-call]
            return max(0, int(estimate) - self._learners)
        return self.controller.target(time.monotonic(), len(self.plan), reports)

    @property
    def _learners(self) -> int:
        return len(self._scheduler.workers) - len(self.observed)

    async def workers_to_close(self, target: int) -> list[str]:
        surplus = len(self.observed) - target
        if surplus <= 0:
            return []
        # the scheduler chooses among all workers; learners that it chooses are skipped
        names = await self.scheduler.workers_to_close(n=surplus + self._learners, attribute="name")
        return [name for name in names if name in self.observed][:surplus]
