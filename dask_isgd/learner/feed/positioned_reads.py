"""Rows out of open files, one positioned read each.

Memory maps would be faster while they stay mapped, but they count as this process's memory; dropping them
whenever a budget is used up makes every row a page fault, which costs several times as much as a read.
A read leaves the pages to the system's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

HELD_SHARE = 0.1
"""Fraction of the memory allowed within which arrays of small rows, such as labels, are kept in memory."""


def read_rows(files: Iterable[int], offsets: Iterable[int], count: int, row: tuple[int, ...], dtype: Any) -> Any:
    """Return ``count`` rows (count, *row) of ``dtype``; row i is at ``offsets[i]`` of the file ``files[i]``.

    A file of -1 leaves its row as it is. Raises OSError if a file ends too soon.
    """
    rows: NDArray[Any] = np.empty((count, *row), dtype)
    flat = rows.reshape(-1).view(np.uint8)
    size, view, at = flat.size // max(1, count), flat.data, 0
    if not size:
        return rows
    read = os.preadv
    for file, offset in zip(files, offsets, strict=True):
        if file >= 0 and (got := read(file, (view[at : at + size],), offset)) != size:
            raise OSError(f"got {got} of the {size} bytes at {offset} of a data file; was it truncated?")
        at += size
    return rows
