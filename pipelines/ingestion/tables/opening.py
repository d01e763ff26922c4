"""The table of a source, whatever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dask_isgd.errors import DataError, IsgdError
from dask_isgd.pipelines.ingestion.tables.arrays import ArrayTable
from dask_isgd.pipelines.ingestion.tables.images import ImageTable
from dask_isgd.pipelines.ingestion.tables.numpy_files import open_numpy
from dask_isgd.pipelines.ingestion.tables.parquet import ParquetTable
from dask_isgd.pipelines.ingestion.tables.table import Table
from dask_isgd.pipelines.ingestion.tables.variables import XarrayTable, open_variables


def open_table(source: Any, *, dimension: str | None = None) -> Table:
    """Return the table of ``source``. Raises DataError for a source of another kind, or with unknown options.

    A source is an ``xarray.Dataset``; a mapping of arrays; a `Table`; or a mapping, as in a YAML recipe, with one of
    ``xarray`` (a file or URL, with options ``engine``, ``group``), ``numpy`` (an .npz file, or a mapping of .npy
    files), ``images`` (a folder, with ``size``, ``mode``) or ``parquet`` (files, with ``features``).
    """
    if hasattr(source, "data_vars"):  # an xarray.Dataset; to import xarray for a type check would take 100 MB
        return XarrayTable(source, dimension or "sample")
    if hasattr(source, "blocks"):
        table: Table = source
        return table
    if not isinstance(source, Mapping):
        raise DataError(
            f"source: got {type(source).__name__}, wanted an xarray.Dataset, a mapping of arrays, or one of "
            "xarray, numpy, images, parquet"
        )
    kinds: dict[str, Callable[..., Table]] = {
        "xarray": lambda place, **options: open_variables(place, dimension or "sample", **options),
        "numpy": open_numpy,
        "images": ImageTable,
        "parquet": lambda place, **options: ParquetTable(str(place), **options),
    }
    kind = next((kind for kind in kinds if isinstance(source.get(kind), (str, Path, Mapping))), None)
    if kind is None:
        return ArrayTable(source)
    options = {str(key): value for key, value in source.items() if key != kind}
    try:
        return kinds[kind](source[kind], **options)
    except (IsgdError, MemoryError):
        raise
    except Exception as error:  # an unknown option, or one that the library behind this kind of source cannot take
        raise DataError(f"source {kind}: {type(error).__name__}: {error}") from error
