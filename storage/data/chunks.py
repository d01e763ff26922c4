"""The chunks of the arrays of a dataset, read so that none is silently replaced by fill values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from zarr.abc.store import Store
from zarr.storage import LocalStore

from dask_isgd.errors import DataError, MissingChunkError
from dask_isgd.storage.backends.stores import Array, decoding, has_key
from dask_isgd.storage.backends.zarr_internals import chunk_key


class Chunks:
    """Reads rows of arrays that are chunked alike along their first dimension: ``length`` rows, ``size`` per chunk.

    ``where`` names the dataset in errors. A chunk that is not in the store raises MissingChunkError, or is read as fill
    values with ``fill``. Any number of threads may read at once.
    """

    def __init__(self, store: Store, where: str, *, length: int, size: int, fill: bool) -> None:
        self.length, self.size = length, size
        self._store, self._where, self._fill = store, where, fill
        self._local = isinstance(store, LocalStore)
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.length // self.size)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """Return the first and the last row (excluded) of a chunk."""
        return chunk * self.size, min((chunk + 1) * self.size, self.length)

    def all(self, array: Array) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row and the rows of each chunk of an array."""
        for chunk in range(self.count):
            start, stop = self.bounds(chunk)
            yield start, self.read(array, start, stop)

    def read(self, array: Array, start: int, stop: int) -> np.ndarray:
        """Return rows of one array, C-contiguous, in native byte order. Raises MissingChunkError, CorruptChunkError.

        The ``rows`` of these errors are those of the unreadable chunk.
        """
        try:
            if start < stop:
                self._require(array, start, stop)
            return self._decode(array, start, stop)
        except DataError:
            for i in range(start // self.size, -(-stop // self.size)):
                try:
                    self._require(array, *self.bounds(i))
                    self._decode(array, *self.bounds(i))
                except DataError as error:  # this one names the unreadable chunk
                    error.rows = self.bounds(i)
                    raise
            raise

    def _decode(self, array: Array, start: int, stop: int) -> np.ndarray:
        first, last = start // self.size, (max(stop, start + 1) - 1) // self.size
        chunks = f"chunk {first}" if first == last else f"one of the chunks {first} to {last}"
        with decoding(f"{self._where}: array {array.path!r}, {chunks}"):
            rows = np.ascontiguousarray(array[start:stop])
            return rows.astype(rows.dtype.newbyteorder("="), copy=False)  # torch accepts no other byte order

    def _require(self, array: Array, start: int, stop: int) -> None:
        """Raise MissingChunkError unless all chunks of these rows are in the store."""
        if self._fill:
            return
        stored = array.shards or array.chunks
        others = [range(-(-extent // size)) for extent, size in zip(array.shape[1:], stored[1:], strict=True)]
        for row in range(start // stored[0], -(-stop // stored[0])):
            for rest in itertools.product(*others):
                key = chunk_key(array, (row, *rest))
                if key in self._seen:
                    continue
                if not has_key(self._store, key):
                    raise MissingChunkError(
                        f"{self._where}: array {array.path!r}, chunk {row} was never written ({key}); "
                        "it would read as fill values. Restore it from a copy or prepare the data again; if its writer "
                        "omits chunks that hold only the fill value, pass Dataset(..., missing='fill')"
                    )
                if not self._local:  # a stat is cheap, but a request is not
                    self._seen.add(key)
