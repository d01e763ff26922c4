"""Reads rewritten chunks of the weight array in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import CorruptChunkError, WaitTimeoutError
from dask_isgd.storage import WeightArray

logger = logging.getLogger(__name__)


class WeightReader:
    """Reads rewritten chunks of the weight array in a thread, so that the loop only takes them over.

    A chunk whose bytes are not those that were written keeps its former weights until it is scored again;
    if ``strict`` that is an error.
    """

    def __init__(self, weights: WeightArray, timeout: float, *, strict: bool) -> None:
        self._weights, self._timeout, self._strict = weights, timeout, strict
        self._wanted: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[int, NDArray[np.float32], int] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="isgd-weights", daemon=True)
        self._thread.start()

    def want(self, chunk: int, version: int) -> None:
        """A chunk was rewritten at ``version``."""
        self._wanted.put((chunk, version))

    def take(self, timeout: float | None = None) -> tuple[int, NDArray[np.float32], int] | None:
        """A chunk, its weights and version; None if none is here (or comes within ``timeout`` seconds)."""
        try:
            item = self._read.get_nowait() if timeout is None else self._read.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._wanted.put(None)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            raise WaitTimeoutError(f"weight reader: not done within {self._timeout:g} s; does the store answer?")

    def _work(self) -> None:
        while (item := self._wanted.get()) is not None:
            try:
                self._read.put((item[0], self._weights.read(item[0]), item[1]))
            except BaseException as error:
                if isinstance(error, CorruptChunkError) and not self._strict:
                    logger.warning("%s; it keeps its former weights", error)
                else:
                    self._read.put(error)  # raised by the learner's next take
