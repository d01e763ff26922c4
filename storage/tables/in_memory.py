"""The table of an object in memory, whatever kind it is: recognised by what it can do, so that no library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dask_isgd.errors import DataError
from dask_isgd.storage.tables.arrays import ArrayTable
from dask_isgd.storage.tables.frames import FrameTable
from dask_isgd.storage.tables.items import HuggingFaceTable, ItemTable, names_of
from dask_isgd.storage.tables.table import Table
from dask_isgd.storage.tables.variables import XarrayTable, likely_dimension
from dask_isgd.storage.tables.zarr_arrays import group_table

KINDS = (
    "an xarray.Dataset, a mapping or tuple of arrays, a map-style torch.utils.data.Dataset, a datasets.Dataset, "
    "a pandas or Dask frame, a zarr.Group"
)
"""What `table_of` takes, for messages."""


def table_of(source: Any, *, dimension: str | None = None, names: Sequence[str] | None = None) -> Table:
    """Return the table of an object in memory, one of `KINDS`; arrays may be numpy, torch, Zarr or Dask arrays.

    ``dimension`` counts the examples of an ``xarray.Dataset``; default: ``"sample"``, or the first one of the target.
    ``names``: read only these of several arrays. A tuple's arrays get the names of `names_of`. Raises DataError for
    anything else.
    """
    if hasattr(source, "data_vars"):  # an xarray.Dataset; to import xarray for a type check would take 100 MB
        return XarrayTable(source, dimension or likely_dimension(source))
    if hasattr(source, "blocks") and hasattr(source, "read"):
        table: Table = source
        return table
    if hasattr(source, "iloc") or (hasattr(source, "partitions") and hasattr(source, "columns")):
        return FrameTable(_with_columns(source))
    if hasattr(source, "column_names") and hasattr(source, "with_format"):
        return HuggingFaceTable(_not_split(source))
    if hasattr(source, "array_keys"):  # a zarr.Group
        return group_table(source, "zarr.Group", dimension=dimension, names=names)
    if isinstance(source, Mapping):
        _not_split(source)
        return ArrayTable({k: v for k, v in source.items() if names is None or k in names})
    if isinstance(source, (tuple, list)):
        return ArrayTable(names_of(source))
    if isinstance(source, (str, Path)) or not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        raise DataError(f"source: got {type(source).__name__}, wanted {KINDS}, or the path or URL of one")
    if hasattr(source, "dtype"):
        raise DataError(
            f"source: got a single {type(source).__name__}, wanted inputs and a target, such as (x, y) or "
            "{'x': x, 'y': y}"
        )
    if hasattr(source, "tensors"):  # a torch TensorDataset
        return ArrayTable(names_of(source.tensors))
    return ItemTable(source)


def _not_split(source: Any) -> Any:
    """Return a source unless it is several of them, such as a ``datasets.DatasetDict``."""
    parts = [name for name, part in source.items() if hasattr(part, "column_names")] if hasattr(source, "items") else []
    if parts:
        raise DataError(f"source: got the datasets {parts}, wanted one of them: pass source[{parts[0]!r}]")
    return source


def _with_columns(frame: Any) -> Any:
    if not hasattr(frame, "columns"):
        raise DataError(f"source: got {type(frame).__name__}, wanted a frame with the columns of inputs and target")
    return frame
