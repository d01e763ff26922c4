"""Rows of local, uncompressed Zarr chunks, each read where it lies."""

from __future__ import annotations

import os
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from dask_isgd.feed.source import Draws, RowSource
from dask_isgd.storage import Dataset, RawArray, Rows

_MOST_FILES = 512
"""Files held open; the usual limit of a process is 1,024."""


class ChunkFiles(RowSource):
    """One positioned read a row.

    Maps of the files would be half as fast again, but count as this process's memory, and would have
    to be dropped whenever the budget is used up; a read leaves the pages to the system's cache.
    A chunk is decoded whole once, when its first row is wanted: a row on its own has no checksum.
    """

    def __init__(self, dataset: Dataset, arrays: tuple[RawArray, ...], draws: Draws, why: str) -> None:
        super().__init__(draws, why)
        self._dataset = dataset
        self._readers = [_Reader(array, dataset.missing == "fill", _MOST_FILES // len(arrays)) for array in arrays]
        self._verified = np.zeros(dataset.n_chunks, bool)

    def gather(self, indices: NDArray[np.int64]) -> Rows:
        chunks = indices // self._dataset.chunk_size
        for chunk in np.unique(chunks[~self._verified[chunks]]):
            self._dataset.chunk(int(chunk))  # raises MissingChunkError, CorruptChunkError
            self._verified[chunk] = True
        taken = [reader.rows(indices) for reader in self._readers]
        return Rows(tuple(taken[:-1]), taken[-1])

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


class _Reader:
    """The files of one array."""

    def __init__(self, array: RawArray, absent_allowed: bool, most: int) -> None:
        self._array, self._absent_allowed, self._most = array, absent_allowed, max(1, most)
        self._open: OrderedDict[int, int] = OrderedDict()

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.generic]:
        array = self._array
        size = array.row_bytes
        flat = np.empty(len(indices) * size, np.uint8)
        view = flat.data
        chunks, inside = np.divmod(indices, array.rows)
        offset = 0
        for chunk, start in zip(chunks.tolist(), (inside * size).tolist(), strict=True):
            descriptor = self._open.get(chunk)
            if descriptor is None:
                descriptor = self._opened(chunk)
            part = view[offset : offset + size]
            if descriptor < 0:
                flat[offset : offset + size] = np.frombuffer(self._filler(), np.uint8)
            elif (got := os.preadv(descriptor, [part], start)) != size:
                raise OSError(f"{array.path(chunk)}: got {got} of the {size} bytes at {start}; was it just cut short?")
            offset += size
        rows = flat.view(array.dtype).reshape(len(indices), *array.row_shape)
        return rows.astype(array.dtype.newbyteorder("="), copy=False)

    def _opened(self, chunk: int) -> int:
        while len(self._open) >= self._most:
            _, descriptor = self._open.popitem(last=False)
            _close(descriptor)
        try:
            descriptor = os.open(self._array.path(chunk), os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            if not self._absent_allowed:
                raise
            descriptor = -1
        self._open[chunk] = descriptor
        return descriptor

    def _filler(self) -> bytes:
        return np.full(self._array.row_shape, self._array.fill, self._array.dtype).tobytes()

    def close(self) -> None:
        for descriptor in self._open.values():
            _close(descriptor)
        self._open.clear()


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
