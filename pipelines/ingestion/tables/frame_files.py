"""Tables in files, read through ``dask.dataframe``: Parquet and CSV."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any

import psutil
from dask.utils import format_bytes

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.extras import needs
from dask_isgd.storage.tables.frames import FrameTable
from dask_isgd.storage.tables.table import reading

_VALUE_BYTES = 8


def open_parquet(url: str) -> FrameTable:
    """Return the table of Parquet files at a path, pattern or URL. Needs pyarrow. Raises DataError."""
    with needs("parquet", "Parquet"):
        import dask.dataframe as dd
        import pyarrow.parquet  # noqa: F401

    paths = _paths(url, "Parquet")
    if not isinstance(paths, str):
        _check_row_groups(paths)
    with reading(url):
        frame = dd.read_parquet(paths, split_row_groups="adaptive", index=False)
    return FrameTable(frame, url)


def open_csv(url: str, **options: Any) -> FrameTable:
    """Return the table of CSV files at a path, pattern or URL; ``options`` are those of ``pandas.read_csv``.

    Raises DataError.
    """
    with needs("parquet", "a CSV file"):  # for dask.dataframe
        import dask.dataframe as dd

    with reading(url):
        frame = dd.read_csv(_paths(url, "CSV"), **options)
    return FrameTable(frame, url)


def _paths(url: str, kind: str) -> list[str] | str:
    paths = sorted(glob.glob(url)) if "://" not in url else url
    if not paths:
        raise EmptyDatasetError(f"{url}: got no files, wanted {kind}; check the path")
    return paths


def _check_row_groups(paths: Sequence[str]) -> None:
    """Refuse a row group that would not fit into memory: a run of equal values of any length takes a few bytes."""
    from pyarrow import parquet

    free = psutil.virtual_memory().available
    for path in paths:
        with reading(path):
            metadata = parquet.read_metadata(path)
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        for group in groups:
            size = max(group.total_byte_size, group.num_rows * group.num_columns * _VALUE_BYTES)
            if size > free // 2:  # decoded once by pyarrow, and once more as a frame
                raise DataError(
                    f"{path}: got a row group of {group.num_rows:,} rows that takes {format_bytes(size)}, and "
                    f"{format_bytes(free)} of memory are free; write the file with smaller row groups"
                )
