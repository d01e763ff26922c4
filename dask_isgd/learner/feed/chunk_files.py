"""Rows of local, uncompressed Zarr chunks, each read at its position."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.learner.feed.positioned_reads import HELD_SHARE, read_rows
from dask_isgd.learner.feed.source import DrawSource, RowSource
from dask_isgd.storage import Dataset, RawArray, Rows

_FILES_SHARE = 0.5
"""Share of the files that this process may have open."""


class ChunkFiles(RowSource):
    """One read per row; arrays of small rows are held in memory.

    A chunk is decoded once, when its first row is needed, because a single row has no checksum.
    """

    def __init__(
        self, dataset: Dataset, arrays: tuple[RawArray, ...], draws: DrawSource, reason: str, *, memory: int
    ) -> None:
        super().__init__(draws, reason)
        self._dataset = dataset
        left = int(HELD_SHARE * memory)
        most = int(_FILES_SHARE * resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._readers: list[_ArrayInMemory | _ArrayFiles] = []
        for name, array in zip(dataset.arrays, arrays, strict=True):
            size = dataset.length * array.row_bytes
            if size <= left:
                left -= size
                self._readers.append(_ArrayInMemory(dataset.load_array(name, draws.unreadable)))
            else:
                self._readers.append(_ArrayFiles(array, dataset.missing == "fill", max(1, most // len(arrays))))
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


class _ArrayInMemory:
    """An array in memory."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return self._values.take(indices, axis=0)

    def close(self) -> None:
        return None


class _ArrayFiles:
    """The files of one array, the last ``most`` of them open."""

    def __init__(self, array: RawArray, absent_allowed: bool, most: int) -> None:
        self._array, self._absent_allowed, self._most = array, absent_allowed, most
        self._open: OrderedDict[int, int] = OrderedDict()
        self._all_open = len(array.keys) <= most  # then none is ever closed, and their order does not matter

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        array = self._array
        native = array.dtype.newbyteorder("=")
        chunks, inside = np.divmod(indices, array.rows)
        rows: list[NDArray[Any]] = []
        # No more files at once than may be open: a batch that touches more is read in parts.
        for first in range(0, len(indices), self._most):
            part = slice(first, first + self._most)
            wanted = chunks[part].tolist()
            if self._all_open and self._open.keys() >= set(wanted):
                files = [self._open[chunk] for chunk in wanted]
            else:
                files = [self._file(chunk) for chunk in wanted]
            offsets = (inside[part] * array.row_bytes).tolist()
            read = read_rows(files, offsets, len(files), array.row_shape, array.dtype).astype(native, copy=False)
            if self._absent_allowed:
                read[np.array(files) < 0] = array.fill
            rows.append(read)
        return rows[0] if len(rows) == 1 else np.concatenate(rows or [np.empty((0, *array.row_shape), native)])

    def _file(self, chunk: int) -> int:
        """Return an open file, or -1 for a chunk that its writer left out."""
        file = self._open.get(chunk)
        if file is not None:
            self._open.move_to_end(chunk)
            return file
        while len(self._open) >= self._most:
            _close(self._open.popitem(last=False)[1])
        try:
            file = os.open(self._array.path(chunk), os.O_RDONLY)
        except FileNotFoundError:
            if not self._absent_allowed:
                raise
            file = -1
        self._open[chunk] = file
        return file

    def close(self) -> None:
        for file in self._open.values():
            _close(file)
        self._open.clear()


def _close(file: int) -> None:
    if file >= 0:
        os.close(file)
