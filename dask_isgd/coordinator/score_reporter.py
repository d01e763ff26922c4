"""What a coordinator writes down and says of the chunks that were scored: stamps, events, portraits."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd import config
from dask_isgd.coordinator.weight_summary import WeightSummarizer
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import DataError
from dask_isgd.events import Event, Scored, WeightSummary
from dask_isgd.order import Order
from dask_isgd.scorer.task import ScoreReport

logger = logging.getLogger(__name__)

_STAMPS_EVERY = 1.0
_PORTRAIT_EVERY = 5.0
_CHUNKS_PER_EVENT = 60
_RATE_OVER = 5.0


class ScoreReporter:
    """Gathers the reports of scoring tasks; tells of them at most so often, and of all in the end.

    ``say`` sends an event, ``check`` raises once another coordinator holds the run: the stamps have
    one writer.
    """

    def __init__(
        self, spec: RunSpec, incarnation: int, say: Callable[[Event], None], check: Callable[[], None]
    ) -> None:
        self._incarnation, self._spec, self._say, self._check = incarnation, spec, say, check
        self._interval = config.seconds("cluster.topic-interval")
        self._weights = spec.directory.open_weights()
        self.stamps: NDArray[np.float64] = self._weights.read_stamps()
        self.examples = 0
        """Examples scored by this coordinator."""
        self._portraits = WeightSummarizer(self._weights.read, self._weights.n_chunks, self._weights.chunk_size)
        self._fresh: list[list[int]] = []
        self._recent: list[tuple[float, int]] = []
        self._stamped = self._said = self._portrayed = 0.0
        self._dirty = False

    @property
    def newest(self) -> Order:
        """The newest version any chunk was scored at."""
        order = max(((inc, v) for v, inc, _ in self.stamps.tolist() if math.isfinite(v)), default=(0, -1))
        return int(order[0]), int(order[1])

    @property
    def orders(self) -> NDArray[np.float64]:
        """(n_chunks,) one number that sorts chunks by the version they were scored at; NaN: never."""
        orders: NDArray[np.float64] = self.stamps[:, 1] * 1e12 + self.stamps[:, 0]
        return orders

    def scored(self, report: ScoreReport) -> None:
        """A chunk was rewritten."""
        self.stamps[report.chunk] = report.version, report.incarnation, time.time()
        self._dirty = True
        self._fresh.append([report.chunk, report.incarnation, report.version])
        self._recent.append((time.monotonic(), report.examples))
        self.examples += report.examples

    def tell(self, step: int, *, complete: bool) -> None:
        """Say and write what is due; ``complete``: nothing is in flight, and somebody waits for the last chunk."""
        now = time.monotonic()
        if self._fresh and (now - self._said >= self._interval or complete):
            self._announce()
        if self._dirty and now - self._stamped >= _STAMPS_EVERY:
            self._stamp()
        if self.examples and now - self._portrayed >= _PORTRAIT_EVERY:
            self._portray(step)

    def close(self, step: int) -> None:
        """Say and write all that is left."""
        if self._dirty:
            self._stamp()
        if self._fresh:
            self._announce()
        if self.examples:
            self._portray(step)

    def _announce(self) -> None:
        """Name the chunks rewritten since the last time."""
        now = self._said = time.monotonic()
        self._recent = [(t, n) for t, n in self._recent if now - t < _RATE_OVER]
        began = self._recent[0][0] if self._recent else now
        rate = sum(n for _, n in self._recent) / max(now - began, self._interval)
        for first in range(0, len(self._fresh), _CHUNKS_PER_EVENT):
            self._say(
                Scored(
                    run=self._spec.run,
                    incarnation=self._incarnation,
                    chunks=self._fresh[first : first + _CHUNKS_PER_EVENT],
                    examples=self.examples,
                    per_second=float(f"{rate:.6g}"),
                )
            )
        self._fresh = []

    def _stamp(self) -> None:
        self._check()
        self._stamped, self._dirty = time.monotonic(), False
        self._weights.write_stamps(self.stamps)

    def _portray(self, step: int) -> None:
        """Show what the weights look like; nobody's work depends on it."""
        self._portrayed = time.monotonic()
        try:
            drawn: dict[str, Any] = self._portraits.draw(self.stamps[:, 0], step)
        except (DataError, OSError):
            logger.warning("run %s: no portrait of the weights", self._spec.run, exc_info=True)
            return
        self._say(WeightSummary(run=self._spec.run, incarnation=self._incarnation, step=step, **drawn))
