"""Reads a scorer's data chunk after chunk, the next one while this one is scored."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dask_isgd.storage import Dataset, Rows

_READ_BYTES = 16 << 20
"""Bytes per read: few enough that the first batch is available soon, enough to outweigh the cost of a call."""

_Key = tuple[object, ...]


class CachedChunkReader:
    """Reads spans of rows, and keeps those that fit into ``memory`` bytes for the next pass.

    A span that is kept is never evicted for another one of the same tag: each is needed once per pass, so
    the evicted span would be needed before the one that replaced it. Spans of other tags, which are earlier
    runs, are evicted. Thread-safe.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._kept: dict[_Key, list[Rows]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes in the cache."""
        return self._bytes

    def batches(self, dataset: Dataset, start: int, stop: int, batch: int, *, tag: object = None) -> Iterator[Rows]:
        """Yield rows ``start`` to ``stop`` in batches of ``batch``, the last one shorter.

        Rows that are kept are not copied: whoever writes to them must ``clear`` the cache. A thread reads ahead inside
        the span, by one read of some chunks. ``tag`` distinguishes datasets that look alike, such as one that was
        rewritten between two runs.
        Raises MissingChunkError and CorruptChunkError at the first batch of a read with such a chunk.
        """
        key = (tag, dataset.url, dataset.group, dataset.input_names, dataset.target_name, start, stop)
        kept = self._cached(key)
        if kept is not None:
            yield from _cut(kept, batch)
            return
        read: list[Rows] | None = [] if (stop - start) * _row_bytes(dataset) <= self.memory else None
        with ThreadPoolExecutor(1, thread_name_prefix="isgd-reader") as thread:
            yield from _cut(_read_ahead(thread, dataset, start, stop, batch, read), batch)
        if read is not None:
            self._keep(key, read)

    def clear(self) -> None:
        """Empty the cache."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _cached(self, key: _Key) -> list[Rows] | None:
        with self._lock:
            return self._kept.get(key)

    def _keep(self, key: _Key, rows: list[Rows]) -> None:
        size = _nbytes(rows)
        with self._lock:
            if key in self._kept:
                return
            others = [other for other in self._kept if other[0] != key[0]]
            while others and self._bytes + size > self.memory:
                self._bytes -= _nbytes(self._kept.pop(others.pop(0)))
            if self._bytes + size <= self.memory:
                self._kept[key] = rows
                self._bytes += size


def begin(batches: Iterator[Rows]) -> Iterator[Rows]:
    """Return the same batches, of which the first one has been read."""
    first = list(itertools.islice(batches, 1))
    return itertools.chain(first, batches)


def _read_ahead(
    thread: ThreadPoolExecutor, dataset: Dataset, start: int, stop: int, batch: int, read: list[Rows] | None
) -> Iterator[Rows]:
    """Yield rows as they are read, one read ahead of the caller, and append them to ``read`` if it is a list."""
    step = _rows_per_read(dataset, batch)
    spans = [(first, min(first + step, stop)) for first in range(start, stop, step)]
    pending: Future[Rows] | None = thread.submit(dataset.read, *spans[0]) if spans else None
    for following in [*spans[1:], None]:
        if pending is None:
            return
        rows = pending.result()
        pending = thread.submit(dataset.read, *following) if following is not None else None
        if read is not None:
            read.append(rows)
        yield rows


def _rows_per_read(dataset: Dataset, batch: int) -> int:
    """Return the rows of about ``_READ_BYTES`` in whole chunks, if possible also in whole batches: it saves a copy."""
    row = _row_bytes(dataset)
    unit = math.lcm(dataset.chunk_size, batch)
    if unit * row > 2 * _READ_BYTES:
        unit = dataset.chunk_size
    return unit * max(1, _READ_BYTES // (row * unit))


def _cut(parts: Iterable[Rows], batch: int) -> Iterator[Rows]:
    """Yield the same rows, ``batch`` at a time; the last batch is shorter."""
    left: Rows | None = None
    for part in parts:
        rows = part if left is None else _joined(left, part)
        whole = len(rows.target) // batch * batch
        for first in range(0, whole, batch):
            yield _slice(rows, first, first + batch)
        left = _slice(rows, whole, len(rows.target)) if whole < len(rows.target) else None
    if left is not None:
        yield left


def _slice(rows: Rows, first: int, last: int) -> Rows:
    return Rows(tuple(x[first:last] for x in rows.inputs), rows.target[first:last])


def _joined(a: Rows, b: Rows) -> Rows:
    inputs = tuple(np.concatenate(pair) for pair in zip(a.inputs, b.inputs, strict=True))
    return Rows(inputs, np.concatenate([a.target, b.target]))


def _row_bytes(dataset: Dataset) -> int:
    return max(1, dataset.nbytes // max(1, dataset.length))


def _nbytes(parts: Iterable[Rows]) -> int:
    return sum(array.nbytes for rows in parts for array in (*rows.inputs, rows.target))


_shared = CachedChunkReader(0)


def shared_reader(memory: int) -> CachedChunkReader:
    """Return the reader of this process, whose threads share its cache; the latest ``memory`` is its budget."""
    _shared.memory = memory
    return _shared
