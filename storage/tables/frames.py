"""Frames of pandas and Dask: one column of the table per column of the frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.table import even_blocks, reading


class FrameTable:
    """A frame, read partition by partition; a pandas frame is a single one.

    A column of lists of equal length becomes an array (N, length). Strings and categories become objects, in which a
    missing value is None; a nullable column of integers becomes float64 with NaN where a value is missing.
    """

    class_names: Sequence[str] | None = None

    def __init__(self, frame: Any, place: str = "frame") -> None:
        self._frame, self._place = frame, place
        lengths = [len(frame)]
        if hasattr(frame, "partitions"):
            with reading(place):
                counted = frame.map_partitions(len, meta=(None, "i8"))
                lengths = [int(n) for n in counted.compute(scheduler="synchronous")]
        self._edges = np.concatenate([[0], np.cumsum(lengths)])
        self.length = int(self._edges[-1])
        names = [str(name) for name in frame.columns]
        self._named = dict(zip(names, frame.columns, strict=True))
        if len(self._named) < len(names):
            raise DataError(f"{place}: got columns {names}, wanted a different name for each")
        # All rows show whether a nullable column needs NaN; of a Dask frame one row must do.
        sample = self._partition(int(np.argmax(lengths)), names, 0, 1 if hasattr(frame, "partitions") else None)
        self.columns = {name: Column(values.shape[1:], values.dtype) for name, values in sample.items()}

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        first, last = np.searchsorted(self._edges, [start, max(start, stop - 1)], side="right") - 1
        parts = []
        for i in range(int(first), min(int(last), len(self._edges) - 2) + 1):
            origin = int(self._edges[i])
            parts.append(self._partition(i, names, max(0, start - origin), max(0, stop - origin)))
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        # No block crosses a partition: each partition is decoded once for every block that touches it.
        spans = [(int(a), int(b)) for a, b in zip(self._edges, self._edges[1:], strict=False) if a < b]
        return [(a + c, a + d) for a, b in spans for c, d in even_blocks(b - a, rows)]

    def _partition(
        self, i: int, names: Sequence[str], start: int = 0, stop: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return rows ``start`` to ``stop`` (excluded) of a partition."""
        frame = self._frame[[self._named[name] for name in names]]
        with reading(self._place):
            if hasattr(frame, "partitions"):
                frame = frame.partitions[i].compute(scheduler="synchronous")
            frame = frame.iloc[start:stop]
        return {name: _values(frame[self._named[name]]) for name in names}


def _values(series: Any) -> NDArray[Any]:
    """Return a column as an array (n, ...) of plain numpy values."""
    import pandas

    kind = series.dtype
    if isinstance(kind, pandas.CategoricalDtype):
        series = series.astype(kind.categories.dtype)
        kind = series.dtype
    if isinstance(kind, pandas.StringDtype) or kind.kind == "O":
        if len(series) and isinstance(series.iloc[0], (list, np.ndarray)):
            return _stacked(series)
        values = series.to_numpy(object, copy=True)
        values[np.asarray(series.isna())] = None
        return np.asarray(values)
    if pandas.api.types.is_extension_array_dtype(kind) and pandas.api.types.is_numeric_dtype(kind):
        return np.asarray(series.to_numpy(np.float64, na_value=np.nan) if series.hasnans else series.to_numpy())
    return np.asarray(series.to_numpy())


def _stacked(series: Any) -> NDArray[Any]:
    lengths = {len(value) if isinstance(value, (list, np.ndarray)) else 0 for value in series}
    if len(lengths) > 1:
        raise DataError(f"column {series.name!r}: got lists of {sorted(lengths)[:5]} numbers, wanted one length")
    return np.stack([np.asarray(value) for value in series])
