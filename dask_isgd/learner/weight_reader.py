"""Reads rewritten chunks of the weight array in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import CorruptChunkError, RunNotFoundError, WaitTimeoutError
from dask_isgd.storage import WeightArray

logger = logging.getLogger(__name__)

_AGAIN = 1.0


class WeightReader:
    """Reads rewritten chunks of the weight array in a thread, so that the learner's loop need not wait for the store.

    A chunk whose bytes fail their checksum keeps its former weights until it is scored again; if
    ``strict``, that is an error. A chunk whose file this host does not see yet, because a network file system
    remembers for a while which files there are, keeps them until it does: it is read again every second.
    """

    def __init__(self, weights: WeightArray, timeout: float, *, strict: bool) -> None:
        self._weights, self._timeout, self._strict = weights, timeout, strict
        self._requests: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, NDArray[np.float32], int] | BaseException] = queue.SimpleQueue()
        self._unseen: dict[int, int] = {}
        """Version of each chunk that is not visible yet."""
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
        retry_at = math.inf
        while True:
            with contextlib.suppress(queue.Empty):
                request = self._requests.get(timeout=_AGAIN if self._unseen else None)
                if request is None:
                    return
                self._try_reading(*request)
            if self._unseen and time.monotonic() >= retry_at:
                for chunk, version in list(self._unseen.items()):
                    self._try_reading(chunk, version)
                retry_at = math.inf
            if not self._unseen:
                retry_at = math.inf
            elif retry_at == math.inf:
                retry_at = time.monotonic() + _AGAIN

    def _try_reading(self, chunk: int, version: int) -> None:
        try:
            self._read(chunk, version)
        except BaseException as error:
            self._unseen.pop(chunk, None)
            if isinstance(error, CorruptChunkError) and not self._strict:
                logger.warning("%s; it keeps its former weights", error)
            else:
                self._results.put(error)  # raised by the learner's next call of `get`

    def _read(self, chunk: int, version: int) -> None:
        weights = self._weights.read(chunk)
        if not np.isnan(weights).all():
            self._unseen.pop(chunk, None)
            self._results.put((chunk, weights, version))
            return
        if not self._weights.exists():
            raise RunNotFoundError(
                f"{self._weights.url} has disappeared: the run directory was deleted or moved while the run was "
                "training. The run stops; restore the directory and resume"
            )
        if chunk not in self._unseen:
            logger.warning("weights of chunk %d are not visible on this host yet; it keeps its former ones", chunk)
        self._unseen[chunk] = version
