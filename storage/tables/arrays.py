"""Arrays by name: numpy, torch, Zarr and Dask arrays, in memory, mapped from files or in a store."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LengthMismatchError
from dask_isgd.storage.backends.zarr_internals import has_regular_chunks
from dask_isgd.storage.data.codecs import require_codecs
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.table import even_blocks, reading


class ArrayTable:
    """Arrays (N, ...) by name: any objects that have a shape and a dtype and can be sliced, or lists of numbers.

    Arrays need not be chunked alike. Torch tensors are read on the CPU, in float32 if they are bfloat16.
    """

    def __init__(self, arrays: Mapping[str, Any], *, class_names: Sequence[str] | None = None) -> None:
        self._arrays = {str(name): _as_array(str(name), values) for name, values in arrays.items()}
        self.class_names = class_names
        single = [name for name, values in self._arrays.items() if len(values.shape) < 1]
        if single or not self._arrays:
            got = f"single numbers for {single}" if single else "no arrays"
            raise DataError(f"source: got {got}, wanted arrays (N, ...)")
        lengths = {name: _length(name, values) for name, values in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise LengthMismatchError(
                f"source: got arrays of lengths {lengths}, wanted the same length for all; name those to read with "
                "inputs=... and target=..."
            )
        self.length = next(iter(lengths.values()))
        self.columns = {
            n: Column(tuple(int(extent) for extent in v.shape[1:]), np.dtype(v.dtype)) for n, v in self._arrays.items()
        }
        stored = [v for v in self._arrays.values() if isinstance(v, zarr.Array) and has_regular_chunks(v)]
        self._unit = max((int((v.shards or v.chunks)[0]) for v in stored), default=1)

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found = {}
        for name in names:
            values = self._arrays[name]
            with reading(f"array {name!r}, rows {start} to {stop}"):
                part = values[start:stop]
                if hasattr(part, "compute"):  # a Dask array; this may itself run in a task
                    part = part.compute(scheduler="synchronous")
                found[name] = np.array(part)
            mapped = getattr(values, "_mmap", None)
            if mapped is not None and getattr(values, "mode", "c") != "c" and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # otherwise the pages that were read count as this process's memory
        return found

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        whole = rows // self._unit * self._unit  # a chunk that two blocks share is decoded twice
        return even_blocks(self.length, whole or rows)


def as_numpy(value: Any) -> NDArray[Any]:
    """Return a tensor, an array, an image or a number as a numpy array; bfloat16 as float32."""
    if hasattr(value, "detach"):  # a tensor; storage does not import torch
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    return np.asarray(value)


def _as_array(name: str, values: Any) -> Any:
    if isinstance(values, zarr.Array):
        require_codecs(values, f"array {name!r}")
        return values
    if hasattr(values, "shape") and hasattr(values, "dtype") and not hasattr(values, "detach"):
        return values.to_numpy() if hasattr(values, "to_numpy") and not hasattr(values, "compute") else values
    with reading(f"array {name!r}"):
        return as_numpy(values)


def _length(name: str, values: Any) -> int:
    length = values.shape[0]
    if length != length:  # a Dask array made from a frame
        raise DataError(f"array {name!r}: got a Dask array of unknown length; call its compute_chunk_sizes() first")
    return int(length)
