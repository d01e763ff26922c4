"""Arrays by name, in memory or mapped from files."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LengthMismatchError
from dask_isgd.pipelines.ingestion.tables.table import even_blocks
from dask_isgd.storage.data.writing import Column


class ArrayTable:
    """Arrays (N, ...) by name: any objects that have a shape and a dtype and can be sliced."""

    def __init__(self, arrays: Mapping[str, Any], *, class_names: Sequence[str] | None = None) -> None:
        self._arrays = {str(n): v if hasattr(v, "dtype") else np.asarray(v) for n, v in arrays.items()}
        self.class_names = class_names
        single = [name for name, values in self._arrays.items() if len(values.shape) < 1]
        if single or not self._arrays:
            got = f"single numbers for {single}" if single else "no arrays"
            raise DataError(f"source: got {got}, wanted arrays (N, ...)")
        lengths = {name: len(values) for name, values in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise LengthMismatchError(f"source: got arrays of lengths {lengths}, wanted the same length for all")
        self.length = next(iter(lengths.values()))
        self.columns = {n: Column(tuple(v.shape[1:]), np.dtype(v.dtype)) for n, v in self._arrays.items()}

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found = {}
        for name in names:
            values = self._arrays[name]
            found[name] = np.array(values[start:stop])
            mapped = getattr(values, "_mmap", None)
            if mapped is not None and getattr(values, "mode", "c") != "c" and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # otherwise the pages that were read count as this process's memory
        return found

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)
