"""Evaluates published versions on all of the validation data, one version at a time."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping
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
_PRIORITY = 5  # ahead of scoring tasks that wait already: an evaluation is rare, and people wait for it
_TRIES = 3


@dataclass(frozen=True)
class EvaluatedVersion:
    """Means over the validation data."""

    incarnation: int
    version: int
    loss: float
    error: float


class Evaluator:
    """Evaluates a version if one is due: every ``evaluate_every`` steps, and always the last one."""

    def __init__(self, spec: RunSpec, client: Client, incarnation: int, tasks: InFlightTasks) -> None:
        self._spec, self._client, self._incarnation, self._tasks = spec, client, incarnation, tasks
        self._current: Parameters | None = None
        self._next: tuple[Parameters, Mapping[str, Any]] | None = None
        self._sum = Evaluation(0, 0.0, 0.0)
        self._last: tuple[int, int] = (0, -spec.learning.evaluate_every)
        self._placement: Mapping[str, Any] = {}
        self._histories: dict[int, History] = {}
        self._failures = 0
        """How often the evaluation of the current version was lost."""
        self._began = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a version is being evaluated, or waits."""
        return self._current is not None or self._next is not None

    def offer(self, parameters: Parameters, placement: Mapping[str, Any]) -> None:
        """Evaluate a version that was published, if it is due."""
        if self._spec.validation is None:
            return
        incarnation, version = parameters.order
        final = version >= self._spec.learning.steps
        due = incarnation != self._last[0] or version - self._last[1] >= self._spec.learning.evaluate_every
        if not (due or final) or (self._current is not None and not final):
            return
        self._next, self._last = (parameters, placement), (incarnation, version)
        if self._current is None:
            self._start()

    def _start(self, failures: int = 0) -> None:
        assert self._next is not None
        (self._current, self._placement), self._next = self._next, None
        self._sum, self._failures = Evaluation(0, 0.0, 0.0), failures
        length = len(self._spec.validation or ())
        size = max(self._spec.scoring.batch_size, -(-length // _MOST_PARTS))
        for part, start in enumerate(range(0, length, size)):
            self._submit(self._current, part, start, min(length, start + size))

    def _submit(self, parameters: Parameters, part: int, start: int, stop: int) -> None:
        group = f"evaluate-{self._spec.run}"
        self._tasks.keep_group(group, self._placement)
        future = self._client.submit(
            evaluate,
            parameters.future,
            self._spec,
            start,
            stop,
            *parameters.order,
            key=(group, part, *parameters.order, uuid.uuid4().hex[:8]),
            pure=False,
            priority=_PRIORITY,
            **self._placement,
        )
        self._tasks.launch(part, future, parameters.order)

    def completed(self) -> Iterator[EvaluatedVersion]:
        """Yield the versions whose evaluation has been completed."""
        for task in self._tasks.completed():
            if self._current is None or task.order != self._current.order:
                continue
            if isinstance(task.result, Evaluation):
                self._sum += task.result
                continue
            # Lost with a worker, or failed: this version is skipped, unless it is the last one, which is tried again.
            logger.warning("evaluation of version %d: %r", task.order[1], task.result)
            self._tasks.cancel()
            parameters, self._current, failures = self._current, None, 0
            if not task.lost and not isinstance(task.result, OSError | KilledWorker):
                raise task.result
            if self._next is None and parameters.version >= self._spec.learning.steps and self._failures + 1 < _TRIES:
                self._next, failures = (parameters, self._placement), self._failures + 1
            if self._next is not None:
                self._start(failures)
            return
        if self._current is not None and len(self._tasks) == 0:
            yield self._complete(self._current)
            self._current = None
            if self._next is not None:
                self._start()

    def _complete(self, parameters: Parameters) -> EvaluatedVersion:
        incarnation, version = parameters.order
        count = max(1, self._sum.examples)
        loss, error = self._sum.loss / count, self._sum.wrong / count
        history = self._history(incarnation, version)
        seconds = time.monotonic() - self._began
        history.append({"step": version, "loss": loss, "error": error, "seconds": seconds})
        history.flush()
        return EvaluatedVersion(incarnation, version, loss, error if math.isfinite(error) else math.nan)

    def _history(self, incarnation: int, version: int) -> History:
        """Return the history of evaluations of a learner's incarnation, created at its first evaluated ``version``."""
        if incarnation not in self._histories:
            learning = self._spec.learning
            self._histories[incarnation] = self._spec.directory.create_history(
                f"evaluation-{incarnation:04d}-{self._incarnation:04d}",
                COLUMNS,
                (learning.steps - version) // learning.evaluate_every + 2,
                attrs={"incarnation": incarnation * 10_000 + self._incarnation, "start_step": version - 1},
            )
        return self._histories[incarnation]

    def close(self) -> None:
        """Cancel what is in flight, and write the rows that wait."""
        self._tasks.cancel()
        for history in self._histories.values():
            history.flush()
