"""The table of a source, whatever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dask_isgd.errors import DataError, IsgdError
from dask_isgd.pipelines.ingestion.tables.frame_files import open_csv, open_parquet
from dask_isgd.pipelines.ingestion.tables.images import ImageTable
from dask_isgd.pipelines.ingestion.tables.numpy_files import open_numpy
from dask_isgd.storage.backends.stores import local_path, redact
from dask_isgd.storage.tables.in_memory import table_of
from dask_isgd.storage.tables.table import Table
from dask_isgd.storage.tables.variables import open_variables
from dask_isgd.storage.tables.zarr_arrays import open_zarr

KINDS = ("xarray", "zarr", "numpy", "images", "parquet", "csv")
"""Kinds of files, the keys of a source in a recipe."""
_SUFFIXES = {
    ".zarr": "zarr",
    **dict.fromkeys((".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".grib", ".grb2"), "xarray"),
    ".npz": "numpy",
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".csv": "csv",
}


def open_table(source: Any, *, dimension: str | None = None, names: Sequence[str] | None = None) -> Table:
    """Return the table of ``source``. Raises DataError for a source of another kind, or with unknown options.

    A source is an object in memory (see `table_of`); the path or URL of a file or folder, whose name or content tells
    its kind; or a mapping, as in a YAML recipe, with one of ``xarray`` (a file or URL, with options ``engine``,
    ``group``), ``zarr`` (a group, with options ``group``, ``storage_options``, or a mapping of arrays), ``numpy`` (an
    .npz file, or a mapping of .npy files), ``images`` (a folder, with ``size``, ``mode``), ``parquet`` or ``csv``
    (files). ``names``: read only these of several arrays.
    """
    if isinstance(source, (str, Path)):
        source = {_kind_of(source): source}
    kind = _kind_in(source)
    if kind is None:
        return table_of(source, dimension=dimension, names=names)
    kinds: dict[str, Callable[..., Table]] = {
        "xarray": lambda place, **options: open_variables(place, dimension, **options),
        "zarr": partial(open_zarr, dimension=dimension, names=names),
        "numpy": partial(open_numpy, names=names),
        "images": ImageTable,
        "parquet": lambda place, **options: open_parquet(str(place), **options),
        "csv": lambda place, **options: open_csv(str(place), **options),
    }
    options = {str(key): value for key, value in source.items() if key != kind}
    try:
        return kinds[kind](source[kind], **options)
    except (IsgdError, MemoryError):
        raise
    except Exception as error:  # an unknown option, or one that the library behind this kind of source cannot take
        raise DataError(f"source {kind}: {type(error).__name__}: {error}") from error


def _kind_in(source: Any) -> str | None:
    """Return the kind of files that a mapping names; None for anything else, such as arrays by name."""
    if type(source) is not dict:
        return None
    return next((kind for kind in KINDS if isinstance(source.get(kind), (str, Path, Mapping))), None)


def _kind_of(place: str | Path) -> str:
    """Return the kind of a file or folder, by its suffix or by what the folder holds."""
    text, path = str(place).rstrip("/"), local_path(place)
    suffix = Path(text).suffix.lower()
    if path is not None and path.is_dir() and suffix not in (".parquet", ".pq"):
        marks = ("zarr.json", ".zgroup", ".zarray")
        return "zarr" if any((path / mark).is_file() for mark in marks) else _SUFFIXES.get(suffix, "images")
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    raise DataError(
        f"source: got {redact(place)}, wanted {', '.join(_SUFFIXES)}, or a folder of images; name the kind of other "
        f"files: a mapping with one of {', '.join(KINDS)}"
    )
