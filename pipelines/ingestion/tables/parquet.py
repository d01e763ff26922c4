"""Parquet files, read through ``dask.dataframe``."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.extras import needs
from dask_isgd.pipelines.ingestion.tables.table import even_blocks, reading
from dask_isgd.storage.data.writing import Column


class ParquetTable:
    """Parquet files: one array per column, or several columns side by side as one array.

    ``features`` maps the name of a new array to the columns it consists of: (N, columns) in their common dtype.
    A column of lists of equal length becomes an array (N, length). Needs pyarrow.
    """

    class_names: Sequence[str] | None = None

    def __init__(self, url: str, *, features: Mapping[str, Sequence[str]] | None = None) -> None:
        import dask

        with needs("parquet", "Parquet"):
            import dask.dataframe as dd
            import pyarrow.parquet  # noqa: F401

        paths = sorted(glob.glob(url)) if "://" not in url else url
        if not paths:
            raise EmptyDatasetError(f"{url}: got no files, wanted Parquet; check the path")
        self._url = url
        with reading(url):
            self._frame = dd.read_parquet(paths, split_row_groups="adaptive", index=False)
        self._features = {name: list(columns) for name, columns in (features or {}).items()}
        absent = [c for columns in self._features.values() for c in columns if c not in self._frame.columns]
        if absent:
            raise DataError(f"{url}: got no columns {absent}; there are {list(self._frame.columns)}")
        with dask.config.set(scheduler="synchronous"), reading(url):
            lengths = [int(n) for n in self._frame.map_partitions(len).compute()]
        self._edges = np.concatenate([[0], np.cumsum(lengths)])
        self.length = int(self._edges[-1])
        sample = self._partition(int(np.argmax(lengths)), [*self._frame.columns, *self._features], 1)
        self.columns = {name: Column(values.shape[1:], values.dtype) for name, values in sample.items()}

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        first, last = np.searchsorted(self._edges, [start, max(start, stop - 1)], side="right") - 1
        parts = []
        for i in range(int(first), min(int(last), len(self._edges) - 2) + 1):
            rows = slice(max(0, start - int(self._edges[i])), max(0, stop - int(self._edges[i])))
            parts.append({name: values[rows] for name, values in self._partition(i, names).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        # No block crosses a partition: each partition is decoded once for every block that touches it.
        spans = [(int(a), int(b)) for a, b in zip(self._edges, self._edges[1:], strict=False) if a < b]
        return [(a + c, a + d) for a, b in spans for c, d in even_blocks(b - a, rows)]

    def _partition(self, i: int, names: Sequence[str], rows: int | None = None) -> dict[str, NDArray[Any]]:
        needed = [c for name in names for c in self._features.get(name, [name])]
        with reading(self._url):
            part = self._frame[list(dict.fromkeys(needed))].partitions[i]
            frame = part.compute(scheduler="synchronous")
        if rows is not None:
            frame = frame.head(rows)
        return {name: _values(frame, self._features.get(name, name)) for name in names}


def _values(frame: Any, columns: str | list[str]) -> NDArray[Any]:
    if isinstance(columns, list):
        return np.ascontiguousarray(frame[columns].to_numpy())
    series = frame[columns]
    if series.dtype.kind == "O" and len(series) and isinstance(series.iloc[0], (list, np.ndarray)):
        lengths = {len(value) for value in series}
        if len(lengths) > 1:
            raise DataError(f"column {columns!r}: got lists of {sorted(lengths)[:5]} numbers, wanted one length")
        return np.stack([np.asarray(value) for value in series])
    return np.asarray(series.to_numpy())
