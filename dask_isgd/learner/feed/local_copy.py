"""A local copy of compressed or remote data, made once, chunk by chunk as chunks are needed."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.learner.feed.positioned_reads import HELD_SHARE, read_rows
from dask_isgd.learner.feed.source import DrawSource, RowSource
from dask_isgd.storage import Dataset, Rows
from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.stores import Array

_REMOTE_READERS = 8
_CLOSE_TIMEOUT = 10.0
"""Seconds that closing waits for a read in progress."""


class LocalCopy(RowSource):
    """Decoded rows in one unnamed flat file per array, which the system removes when this process ends.

    A chunk is copied when its first row is needed; a background thread copies all others
    meanwhile. Arrays of small rows are held in memory, in a tenth of ``memory`` bytes.
    Raises StorageFullError if ``folder`` has no room for all of it.
    """

    def __init__(self, dataset: Dataset, draws: DrawSource, reason: str, *, folder: str | None, memory: int) -> None:
        super().__init__(draws, reason)
        self._dataset = dataset
        with ExitStack() as stack:
            self._files: list[_FlatFile | _ArrayInMemory] = []
            left = int(HELD_SHARE * memory)
            for array in dataset.arrays.values():
                size = array.size * array.dtype.itemsize
                held = size <= left
                left -= size if held else 0
                file = _ArrayInMemory(array) if held else _FlatFile(array, folder)
                self._files.append(stack.enter_context(closing(file)))
            self._release = stack.pop_all().close
        self._copied = np.zeros(dataset.n_chunks, bool)
        self._complete = self._closed = False
        self._lock = threading.Lock()
        self._pending: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1 if dataset.local else _REMOTE_READERS, thread_name_prefix="isgd-copy")
        self._filler = threading.Thread(target=self._fill, name="isgd-copy", daemon=True)
        self._filler.start()

    def gather(self, indices: NDArray[np.int64]) -> Rows:
        if not self._complete:
            chunks = indices // self._dataset.chunk_size
            for wanted in [self._request(int(chunk)) for chunk in np.unique(chunks[~self._copied[chunks]])]:
                wanted.result()
        taken = [file.rows(indices) for file in self._files]
        return Rows(tuple(taken[:-1]), taken[-1])

    @property
    def complete(self) -> bool:
        """Whether every chunk has been copied."""
        return self._complete

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the background copy has ended; return whether it is complete."""
        self._filler.join(timeout)
        return self._complete

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._filler.join(_CLOSE_TIMEOUT)
        if not self._filler.is_alive():  # else a read hangs: the files end with the process
            self._release()

    def _request(self, chunk: int) -> Future[None]:
        with self._lock:
            coming = self._pending.get(chunk)
            if coming is None:
                coming = self._pending[chunk] = self._pool.submit(self._copy, chunk)
            return coming

    def _copy(self, chunk: int) -> None:
        try:
            if self._copied[chunk]:
                return
            rows = self._dataset.chunk(chunk)
            start = chunk * self._dataset.chunk_size
            for file, values in zip(self._files, (*rows.inputs, rows.target), strict=True):
                file.write(start, values)
            self._copied[chunk] = True
        finally:
            with self._lock:
                del self._pending[chunk]  # a chunk that failed is tried again by the next draw that needs it

    def _fill(self) -> None:
        """Copy all other chunks, a few at a time so that a chunk needed by a draw is near the front."""
        ahead = 1 if self._dataset.local else _REMOTE_READERS // 2
        for first in range(0, self._dataset.n_chunks, ahead):
            try:
                wanted = [self._request(c) for c in range(first, min(first + ahead, self._dataset.n_chunks))]
                for coming in wanted:
                    coming.exception()  # a bad chunk is an error of the draw that needs it
            except (RuntimeError, CancelledError):
                if not self._closed:
                    raise
            if self._closed:
                return
        self._complete = bool(self._copied.all())


class _FlatFile:
    """Rows one after another in an unnamed file."""

    def __init__(self, array: Array, folder: str | None) -> None:
        self._dtype, self._row = np.dtype(array.dtype.newbyteorder("=")), tuple(array.shape[1:])
        self._row_bytes = math.prod(self._row) * self._dtype.itemsize
        size = array.shape[0] * self._row_bytes
        with writing(folder or tempfile.gettempdir()):
            self._file: IO[bytes] = tempfile.TemporaryFile(prefix="isgd-", dir=folder, buffering=0)  # noqa: SIM115
            try:
                if hasattr(os, "posix_fallocate"):  # lack of space is an error now, not during the run
                    os.posix_fallocate(self._file.fileno(), 0, max(1, size))
            except BaseException:
                self._file.close()
                raise

    def write(self, start: int, values: NDArray[Any]) -> None:
        rest = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        offset = start * self._row_bytes
        while rest:
            done = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[done:], offset + done

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        file = itertools.repeat(self._file.fileno(), len(indices))
        rows: NDArray[Any] = read_rows(file, (indices * self._row_bytes).tolist(), len(indices), self._row, self._dtype)
        return rows

    def close(self) -> None:
        self._file.close()


class _ArrayInMemory:
    """Rows in memory, if they are too small for a read each."""

    def __init__(self, array: Array) -> None:
        self._rows: NDArray[Any] = np.empty(array.shape, array.dtype.newbyteorder("="))

    def write(self, start: int, values: NDArray[Any]) -> None:
        self._rows[start : start + len(values)] = values

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return self._rows.take(indices, axis=0)

    def close(self) -> None:
        return None
