"""Reads rewritten chunks of the weight array in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import CorruptChunkError, WaitTimeoutError
from dask_isgd.storage import WeightArray

logger = logging.getLogger(__name__)


class WeightReader:
    """Reads rewritten chunks of the weight array in a thread, so that the learner's loop need not wait for the store.

    A chunk whose bytes fail their checksum keeps its former weights until it is scored again; if
    ``strict``, that is an error.
    """

    def __init__(self, weights: WeightArray, timeout: float, *, strict: bool) -> None:
        self._weights, self._timeout, self._strict = weights, timeout, strict
        self._requests: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, NDArray[np.float32], int] | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def open(self) -> Self:
        """Start the thread."""
        self._thread = threading.Thread(target=self._work, name="isgd-weights", daemon=True)
        self._thread.start()
        return self

    def request(self, chunk: int, version: int) -> None:
        """Read a chunk that was rewritten at ``version``."""
        self._requests.put((chunk, version))

    def get(self, timeout: float | None = None) -> tuple[int, NDArray[np.float32], int] | None:
        """Return a chunk, its weights and version; None if none has been read, or is within ``timeout`` seconds."""
        try:
            result = self._results.get_nowait() if timeout is None else self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """End the thread once it has read what was requested."""
        if self._thread is None:
            return
        self._requests.put(None)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            raise WaitTimeoutError(f"weight reader: not done within {self._timeout:g} s; is the store responding?")

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            chunk, version = request
            try:
                self._results.put((chunk, self._weights.read(chunk), version))
            except BaseException as error:
                if isinstance(error, CorruptChunkError) and not self._strict:
                    logger.warning("%s; it keeps its former weights", error)
                else:
                    self._results.put(error)  # raised by the learner's next call of `get`
