"""Reports which chunks were scored: stamps in the weight array, events, summaries of all weights."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.coordinator.weight_summary import WeightSummarizer
from dask_isgd.errors import DataError
from dask_isgd.events import name_of
from dask_isgd.order import Order, sort_key
from dask_isgd.runtime.announcer import Announcer
from dask_isgd.scorer.task import ScoreReport
from dask_isgd.storage import WeightArray
from dask_isgd.storage.run.leases import Lease

logger = logging.getLogger(__name__)

_STAMP_EVERY = 1.0
_SUMMARISE_EVERY = 5.0
_CHUNKS_PER_EVENT = 60
_RATE_WINDOW = 5.0


class ScoreReporter:
    """Gathers the reports of scoring tasks, and reports them at limited rates and completely at the end.

    Chunks are announced every ``interval`` seconds. The lease is checked before stamps are written:
    they have one writer.
    """

    def __init__(self, weights: WeightArray, announcer: Announcer, lease: Lease, interval: float) -> None:
        self._weights, self._announcer, self._lease, self._interval = weights, announcer, lease, interval
        self.stamps: NDArray[np.float64] = weights.read_stamps()
        self.examples = 0
        """Examples scored by this coordinator."""
        self._summarizer = WeightSummarizer(weights.read, weights.n_chunks, weights.chunk_size)
        self._rewritten: list[list[int]] = []
        self._recent: list[tuple[float, int]] = []
        self._stamped = self._announced = self._summarised = 0.0
        self._unstamped = False

    @property
    def latest(self) -> Order:
        """The latest version at which any chunk was scored."""
        order = max(((inc, v) for v, inc, _ in self.stamps.tolist() if math.isfinite(v)), default=(0, -1))
        return int(order[0]), int(order[1])

    @property
    def orders(self) -> NDArray[np.float64]:
        """(n_chunks,) one number that sorts chunks by the version at which they were scored; NaN if never."""
        return sort_key(self.stamps[:, 1], self.stamps[:, 0])

    def add(self, report: ScoreReport) -> None:
        """Add a chunk that was rewritten."""
        self.stamps[report.chunk] = report.version, report.incarnation, time.time()
        self._unstamped = True
        self._rewritten.append([report.chunk, report.incarnation, report.version])
        self._recent.append((time.monotonic(), report.examples))
        self.examples += report.examples

    def report(self, step: int, *, complete: bool) -> None:
        """Announce and write what is due; if ``complete``, nothing is in flight and a learner waits for the chunks."""
        now = time.monotonic()
        if self._rewritten and (now - self._announced >= self._interval or complete):
            self._announce()
        if self._unstamped and now - self._stamped >= _STAMP_EVERY:
            self._stamp()
        if self.examples and now - self._summarised >= _SUMMARISE_EVERY:
            self._summarise(step)

    def close(self, step: int) -> None:
        """Announce and write everything that is left."""
        if self._unstamped:
            self._stamp()
        if self._rewritten:
            self._announce()
        if self.examples:
            self._summarise(step)

    def _announce(self) -> None:
        now = self._announced = time.monotonic()
        self._recent = [(t, n) for t, n in self._recent if now - t < _RATE_WINDOW]
        began = self._recent[0][0] if self._recent else now
        rate = sum(n for _, n in self._recent) / max(now - began, self._interval)
        for first in range(0, len(self._rewritten), _CHUNKS_PER_EVENT):
            chunks = self._rewritten[first : first + _CHUNKS_PER_EVENT]
            self._announcer.scored(chunks, examples=self.examples, per_second=float(f"{rate:.6g}"))
        self._rewritten = []

    def _stamp(self) -> None:
        self._lease.check()
        self._stamped, self._unstamped = time.monotonic(), False
        self._weights.write_stamps(self.stamps)

    def _summarise(self, step: int) -> None:
        """Announce what the weights look like. No computation depends on it, so an error is only logged."""
        self._summarised = time.monotonic()
        try:
            summary: dict[str, Any] = self._summarizer.summarize(self.stamps[:, 0], step)
        except (DataError, OSError):
            logger.warning("run %s: the weights cannot be summarised", name_of(self._announcer.run), exc_info=True)
            return
        self._announcer.weight_summary(step, summary)
