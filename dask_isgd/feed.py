"""From drawn indices to minibatches on the learner's device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from dask.utils import format_bytes
from numpy.typing import NDArray
from torch import Tensor

from dask_isgd import models
from dask_isgd.errors import WaitTimeout
from dask_isgd.sampling import Draw
from dask_isgd.storage import Dataset


class Minibatch(NamedTuple):
    """B examples with the coefficients of the very draw that chose them."""

    step: int
    draw: Draw
    inputs: tuple[Tensor, ...]
    targets: Tensor


class Source(Protocol):
    """Where rows come from."""

    why: str
    """Which way was chosen, and why."""
    in_memory: bool

    def gather(self, indices: NDArray[np.int64]) -> tuple[tuple[NDArray[Any], ...], NDArray[Any]]:
        """Inputs and targets of the rows, in the order of ``indices``."""


class _Memory:
    in_memory = True

    def __init__(self, dataset: Dataset, why: str) -> None:
        rows = dataset.load()
        self._inputs, self._target = rows.inputs, rows.target
        self.why = why

    def gather(self, indices: NDArray[np.int64]) -> tuple[tuple[NDArray[Any], ...], NDArray[Any]]:
        return tuple(x.take(indices, axis=0) for x in self._inputs), self._target.take(indices, axis=0)


class _Store:
    in_memory = False

    def __init__(self, dataset: Dataset, why: str) -> None:
        self._dataset = dataset
        self.why = why

    def gather(self, indices: NDArray[np.int64]) -> tuple[tuple[NDArray[Any], ...], NDArray[Any]]:
        rows = self._dataset.rows(indices)
        return rows.inputs, rows.target


def open_source(dataset: Dataset, memory: int) -> Source:
    """The whole dataset in memory if it fits into ``memory`` bytes, else rows out of the store."""
    size = f"{format_bytes(dataset.nbytes)} of data, {format_bytes(memory)} of memory"
    if dataset.nbytes <= memory:
        return _Memory(dataset, f"in memory: {size}")
    return _Store(dataset, f"rows from the store: {size}")


class Feed:
    """Draws and gathers minibatches; ahead of the learner where gathering is slow.

    ``draw`` is called with the step and must be safe to call from a thread. A minibatch keeps the
    coefficients it was drawn with, however long it waited.
    """

    def __init__(
        self, source: Source, draw: Callable[[int], Draw], prepare: models.Prepare, *, ahead: int, timeout: float
    ) -> None:
        self._source, self._draw, self._prepare = source, draw, prepare
        self._ahead, self._timeout = ahead, timeout
        self._thread: threading.Thread | None = None
        self._ready: queue.Queue[Minibatch | BaseException] = queue.Queue(maxsize=max(1, ahead))
        self._stop = threading.Event()

    def _make(self, step: int) -> Minibatch:
        draw = self._draw(step)
        inputs, target = self._source.gather(draw.indices)
        x, y = self._prepare(inputs, target)
        return Minibatch(step, draw, x, y)

    def __call__(self, step: int, until: int) -> Minibatch:
        """The minibatch of ``step``; nothing is drawn ahead for ``until`` or later."""
        if self._ahead == 0:
            return self._make(step)
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, args=(step, until), name="isgd-feed", daemon=True)
            self._thread.start()
        try:
            item = self._ready.get(timeout=self._timeout)
        except queue.Empty:
            raise WaitTimeout(
                f"step {step}: no minibatch within {self._timeout:g} s; is the data's store slow?"
            ) from None
        if isinstance(item, BaseException):
            self._thread = None
            raise item
        if item.step == until - 1:
            self._thread.join(self._timeout)
            self._thread = None
        return item

    def _work(self, first: int, until: int) -> None:
        try:
            for step in range(first, until):
                self._put(self._make(step))
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed to the learner, which raises it
            self._put(error)

    def _put(self, item: Minibatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """Stop drawing ahead."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._timeout)
            self._thread = None
