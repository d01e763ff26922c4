"""Plain Zarr, formats 2 and 3: a group, or arrays by name, chunked in any way and written by anybody."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import zarr

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.storage.backends.stores import Array, StorageOptions, open_store, opening, redact
from dask_isgd.storage.backends.zarr_internals import dimension_names
from dask_isgd.storage.data.codecs import require_codecs
from dask_isgd.storage.tables.arrays import ArrayTable
from dask_isgd.storage.tables.table import Table, reading
from dask_isgd.storage.tables.variables import XarrayTable, likely_dimension

logger = logging.getLogger(__name__)

_COUNTED_CHUNKS = 1 << 14
"""Chunks of an array up to which missing ones are counted: Zarr looks for each of them."""


def open_zarr(
    place: Any,
    *,
    dimension: str | None = None,
    names: Sequence[str] | None = None,
    group: str | None = None,
    storage_options: StorageOptions = None,
) -> Table:
    """Return the table of a Zarr group at a path or URL, or of arrays at paths by name.

    The first dimension counts the examples, and arrays of other lengths must not be among ``names`` (default: all).
    If the arrays name all their dimensions, they are read through xarray, which decodes packed values and finds
    ``dimension`` at any place. Raises DataError.
    """
    if isinstance(place, Mapping):
        paths = {str(name): str(path) for name, path in place.items()}
        return _table({name: _open(path, "", storage_options) for name, path in paths.items()}, "zarr")
    found = _open(str(place), group or "", storage_options)
    if isinstance(found, zarr.Array):
        raise DataError(
            f"{redact(place)}: got a single array, wanted a group of arrays, or arrays by name: "
            "zarr: {x: one.zarr, y: other.zarr}"
        )
    return group_table(found, redact(place), dimension=dimension, names=names)


def group_table(
    group: zarr.Group, place: str, *, dimension: str | None = None, names: Sequence[str] | None = None
) -> Table:
    """Return the table of an open group, as `open_zarr` does; ``place`` names it in errors."""
    arrays = {str(name): array for name, array in group.arrays() if array.ndim}
    if not arrays:
        groups = ", ".join(repr(name) for name in sorted(group.group_keys())) or "none"
        raise EmptyDatasetError(f"{place}: got no arrays; groups in it: {groups}. Name one with group: NAME")
    if all(None not in dimension_names(array) for array in arrays.values()):
        for array in arrays.values():
            require_codecs(array, place)
        import xarray

        with reading(place):
            opened = xarray.open_zarr(group.store, group=group.path or None, chunks=None)
        return XarrayTable(opened, dimension or likely_dimension(opened))
    return _table({n: a for n, a in arrays.items() if names is None or n in names}, place)


def _open(place: str, group: str, storage_options: StorageOptions) -> Any:
    store = open_store(place, read_only=True, storage_options=storage_options)
    with opening(redact(place)):
        try:
            return zarr.open(store, path=group, mode="r")
        except FileNotFoundError:
            raise DataError(
                f"{redact(place)}{f', group {group!r}' if group else ''}: cannot be opened: there is no Zarr; check "
                "the path"
            ) from None


def _table(arrays: Mapping[str, Array], place: str) -> ArrayTable:
    for name, array in arrays.items():
        if not isinstance(array, zarr.Array):
            raise DataError(f"{place}: got a group for {name!r}, wanted an array")
        missing = array.nchunks - array.nchunks_initialized if 0 < array.nchunks <= _COUNTED_CHUNKS else 0
        if missing > 0:
            logger.warning(
                "%s: %d of the %d chunks of array %r are not in the store, and are read as %s",
                place, missing, array.nchunks, name, array.fill_value,
            )  # fmt: skip
    return ArrayTable(arrays)
