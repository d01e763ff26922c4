"""Evaluator of published versions on the whole validation data, one version at a time."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distributed import Client, KilledWorker

from dask_isgd.coordinator.in_flight import InFlightTasks
from dask_isgd.core.spec import RunSpec
from dask_isgd.runtime.parameters import Parameters
from dask_isgd.scorer.task import Evaluation, evaluate
from dask_isgd.storage import History

logger = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "error", "seconds")
_MOST_PARTS = 64
_PRIORITY = 5  # before the scoring tasks that wait already: an evaluation is rare, and people wait for it
_TRIES = 3


@dataclass(frozen=True)
class Evaluated:
    """Means over the validation data."""

    incarnation: int
    version: int
    loss: float
    error: float


class Evaluator:
    """Evaluates a version when one is due: every ``evaluate_every`` steps, the last one always."""

    def __init__(self, spec: RunSpec, client: Client, incarnation: int, wake: Callable[[], None]) -> None:
        self._spec, self._client, self._incarnation = spec, client, incarnation
        self._flight = InFlightTasks(client, spec.scoring.timeout_seconds, wake)
        self._now: Parameters | None = None
        self._next: tuple[Parameters, Mapping[str, Any]] | None = None
        self._sum = Evaluation(0, 0.0, 0.0)
        self._last: tuple[int, int] = (0, -spec.learning.evaluate_every)
        self._placement: Mapping[str, Any] = {}
        self._history: dict[int, History] = {}
        self._tries = 0
        self._began = time.monotonic()

    @property
    def busy(self) -> bool:
        return self._now is not None or self._next is not None

    def offer(self, parameters: Parameters, placement: Mapping[str, Any]) -> None:
        """A version was published; it is evaluated if it is due."""
        if self._spec.validation is None:
            return
        incarnation, version = parameters.order
        final = version >= self._spec.learning.steps
        due = incarnation != self._last[0] or version - self._last[1] >= self._spec.learning.evaluate_every
        if not (due or final) or (self._now is not None and not final):
            return
        self._next, self._last = (parameters, placement), (incarnation, version)
        if self._now is None:
            self._start()

    def _start(self) -> None:
        assert self._next is not None
        (self._now, self._placement), self._next = self._next, None
        self._sum, self._tries = Evaluation(0, 0.0, 0.0), 0
        length = len(self._spec.validation or ())
        size = max(self._spec.scoring.batch_size, -(-length // _MOST_PARTS))
        for part, start in enumerate(range(0, length, size)):
            self._launch(part, start, min(length, start + size))

    def _launch(self, part: int, start: int, stop: int) -> None:
        assert self._now is not None
        future = self._client.submit(
            evaluate,
            self._now.future,
            self._spec,
            start,
            stop,
            *self._now.order,
            key=(f"evaluate-{self._spec.run}", part, *self._now.order, uuid.uuid4().hex[:8]),
            pure=False,
            priority=_PRIORITY,
            **self._placement,
        )
        self._flight.launch(part, future, self._now.order)

    def land(self) -> Iterator[Evaluated]:
        """Versions whose evaluation is complete by now."""
        for landed in self._flight.completed():
            if self._now is None or landed.order != self._now.order:
                continue
            if isinstance(landed.result, Evaluation):
                self._sum += landed.result
                continue
            # Lost with a worker or failed: this version goes without, a later one is evaluated whole.
            logger.warning("evaluation of version %d: %r", landed.order[1], landed.result)
            self._flight.cancel()
            self._tries += 1
            parameters, self._now = self._now, None
            if not landed.lost and not isinstance(landed.result, OSError | KilledWorker):
                raise landed.result
            if parameters.version >= self._spec.learning.steps and self._tries < _TRIES:
                self._next = (parameters, self._placement)
                self._start()
            return
        if self._now is not None and len(self._flight) == 0:
            yield self._complete(self._now)
            self._now = None
            if self._next is not None:
                self._start()

    def _complete(self, parameters: Parameters) -> Evaluated:
        incarnation, version = parameters.order
        count = max(1, self._sum.examples)
        loss, error = self._sum.loss / count, self._sum.wrong / count
        history = self._history.get(incarnation)
        if history is None:
            learning = self._spec.learning
            history = self._history[incarnation] = self._spec.directory.create_history(
                f"evaluation-{incarnation:04d}-{self._incarnation:04d}",
                COLUMNS,
                (learning.steps - version) // learning.evaluate_every + 2,
                attrs={"incarnation": incarnation * 10_000 + self._incarnation, "start_step": version - 1},
            )
        seconds = time.monotonic() - self._began
        history.append({"step": version, "loss": loss, "error": error, "seconds": seconds})
        history.flush()
        return Evaluated(incarnation, version, loss, error if math.isfinite(error) else math.nan)

    def close(self) -> None:
        """Give up what is in flight and write what is there."""
        self._flight.cancel()
        for history in self._history.values():
            history.flush()
