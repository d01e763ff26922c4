"""A local copy of compressed or remote data, made once, chunk by chunk as they are wanted."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dask_isgd.feed.source import Draws, RowSource
from dask_isgd.storage import Dataset, Rows
from dask_isgd.storage.files import writing

_MAPPED_AT_ONCE = 16 * mmap.PAGESIZE
"""What the system maps at once around a page that is touched."""
_REMOTE_READERS = 8


class LocalCopy(RowSource):
    """Decoded rows in one flat file an array, under no name: the system removes it with this process.

    A chunk is copied when its first row is wanted, and all others meanwhile by a thread in the
    background. The files are mapped; what is mapped is let go before it exceeds ``memory`` bytes,
    which costs a fault a page but no read while the system caches the file.
    Raises StorageFullError where ``folder`` has no room for all of it.
    """

    def __init__(self, dataset: Dataset, draws: Draws, why: str, *, folder: str | None, memory: int) -> None:
        super().__init__(draws, why)
        self._dataset = dataset
        with ExitStack() as stack:
            self._files = [
                stack.enter_context(closing(_FlatFile(array.shape, array.dtype.newbyteorder("="), folder)))
                for array in dataset.arrays.values()
            ]
            self._release = stack.pop_all().close
        self._touched = 0
        # A row may lie across the border of two ranges that are mapped at once.
        self._at_once = max(1, memory // sum(file.row_bytes + 2 * _MAPPED_AT_ONCE for file in self._files))
        self._there = np.zeros(dataset.n_chunks, bool)
        self._complete = self._closed = False
        self._lock = threading.Lock()
        self._coming: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1 if dataset.local else _REMOTE_READERS, thread_name_prefix="isgd-copy")
        self._filler = threading.Thread(target=self._fill, name="isgd-copy", daemon=True)
        self._filler.start()

    def gather(self, indices: NDArray[np.int64]) -> Rows:
        if not self._complete:
            chunks = indices // self._dataset.chunk_size
            for wanted in [self._want(int(chunk)) for chunk in np.unique(chunks[~self._there[chunks]])]:
                wanted.result()
        taken = [np.empty((len(indices), *file.rows.shape[1:]), file.rows.dtype) for file in self._files]
        for first in range(0, len(indices), self._at_once):
            part = indices[first : first + self._at_once]
            self._touched += len(part)
            if self._touched > self._at_once:
                self._touched = len(part)
                for file in self._files:
                    file.let_go()
            for file, out in zip(self._files, taken, strict=True):
                file.rows.take(part, axis=0, out=out[first : first + len(part)], mode="clip")  # "raise" would copy
        return Rows(tuple(taken[:-1]), taken[-1])

    @property
    def complete(self) -> bool:
        """Whether every chunk has been copied."""
        return self._complete

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the background copy has ended; whether it is complete."""
        self._filler.join(timeout)
        return self._complete

    def close(self) -> None:
        self._closed = True
        self._filler.join()
        self._pool.shutdown(cancel_futures=True)
        self._release()

    def _want(self, chunk: int) -> Future[None]:
        with self._lock:
            coming = self._coming.get(chunk)
            if coming is None:
                coming = self._coming[chunk] = self._pool.submit(self._copy, chunk)
            return coming

    def _copy(self, chunk: int) -> None:
        try:
            if self._there[chunk]:
                return
            rows = self._dataset.chunk(chunk)
            start = chunk * self._dataset.chunk_size
            for file, values in zip(self._files, (*rows.inputs, rows.target), strict=True):
                file.write(start, values)
            self._there[chunk] = True
        finally:
            with self._lock:
                del self._coming[chunk]  # a chunk that failed is tried anew by the next draw that wants it

    def _fill(self) -> None:
        """Everything else, a few at a time so that what a draw waits for is never far back in the queue."""
        ahead = 1 if self._dataset.local else _REMOTE_READERS // 2
        for first in range(0, self._dataset.n_chunks, ahead):
            wanted = [self._want(c) for c in range(first, min(first + ahead, self._dataset.n_chunks))]
            for coming in wanted:
                coming.exception()  # a bad chunk is an error of the draw that wants it
            if self._closed:
                return
        self._complete = bool(self._there.all())


class _FlatFile:
    """Rows one after another in a file without a name."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, folder: str | None) -> None:
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        size = shape[0] * self.row_bytes
        with writing(folder or tempfile.gettempdir()):
            self._file: IO[bytes] = tempfile.TemporaryFile(prefix="isgd-", dir=folder, buffering=0)  # noqa: SIM115
            try:
                os.truncate(self._file.fileno(), max(1, size))
                if hasattr(
                    os, "posix_fallocate"
                ):  # all the room is taken now, not found missing in the middle of a run
                    os.posix_fallocate(self._file.fileno(), 0, max(1, size))
            except BaseException:
                self._file.close()
                raise
        self._map = mmap.mmap(self._file.fileno(), max(1, size), access=mmap.ACCESS_READ)
        self.rows: NDArray[np.generic] = np.frombuffer(self._map, dtype, math.prod(shape)).reshape(shape)

    def write(self, start: int, values: NDArray[np.generic]) -> None:
        rest = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        offset = start * self.row_bytes
        while rest:
            done = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[done:], offset + done

    def let_go(self) -> None:
        """Unmap the pages; the system's cache keeps them."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        del self.rows
        self._file.close()  # the map goes with the last array that views it
