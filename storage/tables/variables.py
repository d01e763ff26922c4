"""The variables of an ``xarray.Dataset``, in memory or in whatever files xarray opens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.extras import needs
from dask_isgd.storage.data.codecs import require_safe_group
from dask_isgd.storage.data.layout import TARGET_NAMES
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.table import even_blocks, reading

_NETCDF = (".nc", ".nc4", ".h5", ".hdf5")


class XarrayTable:
    """The variables of an ``xarray.Dataset`` that have ``dimension``, at any place in their shape."""

    class_names: Sequence[str] | None = None

    def __init__(self, data: Any, dimension: str) -> None:
        if dimension not in data.sizes:
            raise DataError(
                f"source: got the dimensions {', '.join(map(repr, data.sizes)) or 'none'}, wanted {dimension!r} among "
                "them; pass dimension=..., the one that counts the examples"
            )
        self._dimension = dimension
        found = {str(name): variable for name, variable in data.variables.items() if dimension in variable.dims}
        self._data = data[[name for name in data.variables if str(name) in found]].reset_coords()
        self.length = int(data.sizes[dimension])
        self.columns = {
            name: Column(tuple(n for d, n in zip(v.dims, v.shape, strict=True) if d != dimension), np.dtype(v.dtype))
            for name, v in found.items()
        }

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        import dask

        with dask.config.set(scheduler="synchronous"):  # this may itself run in a task
            part = self._data[list(names)].isel({self._dimension: slice(start, stop)})
            with reading(f"variables {', '.join(names)}"):
                return {name: np.asarray(part[name].transpose(self._dimension, ...).values) for name in names}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)


def likely_dimension(data: Any) -> str:
    """Return the dimension that counts the examples of an ``xarray.Dataset``: ``sample``, or the target's first one."""
    first = [str(data[name].dims[0]) for name in TARGET_NAMES if name in data.data_vars and data[name].dims]
    return "sample" if "sample" in data.sizes or len(first) != 1 else first[0]


def open_variables(place: Any, dimension: str | None, **options: Any) -> XarrayTable:
    """Return the table of a file or URL that xarray opens. Raises DataError if it cannot be opened."""
    import xarray

    text = str(place)
    try:
        if text.rstrip("/").endswith(".zarr") or options.get("engine") == "zarr":
            options = {"chunks": None, **options}
            options.pop("engine", None)
            require_safe_group(text, options.get("group"), options.get("storage_options"))
            opened = xarray.open_zarr(text, **options)
        else:
            opened = xarray.open_dataset(text, **options)
        return XarrayTable(opened, dimension or likely_dimension(opened))
    except DataError:
        raise
    except Exception as error:  # whatever a backend raises
        if text.endswith(_NETCDF) and not {"h5netcdf", "netcdf4"} & set(xarray.backends.list_engines()):
            with needs("netcdf", text):
                import h5netcdf  # noqa: F401
        raise DataError(f"{place}: cannot be opened by xarray ({error})") from error
