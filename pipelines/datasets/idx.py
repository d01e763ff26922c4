"""The IDX format of the MNIST family: a header of a few bytes, followed by a big-endian array."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def read_idx(path: str | Path, *, limit: int = 1 << 30) -> NDArray[Any]:
    """Return the array of an IDX file, gzipped or not, in the byte order of this machine.

    Never unpacks more bytes than the header promises. Raises DataError if it promises more than ``limit`` bytes, or
    if the file is truncated, too long or of another kind.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            shape, dtype, start = _header(file.read, path)
            size = math.prod(shape) * dtype.itemsize
            if size > limit:
                raise DataError(
                    f"{path}: got a header that promises {size:,} bytes for shape {shape}, wanted at most {limit:,}; "
                    "is it the right file?"
                )
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download the file again") from error
    if len(content) != size:
        got = f"{start + len(content):,}" if len(content) < size else f"more than {start + size:,}"
        raise DataError(f"{path}: got {got} bytes, wanted {start + size:,} for shape {shape}; download the file again")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _header(read: Callable[[int], bytes], path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return the shape, the dtype in the file's byte order, and the size of the header in bytes."""
    kind = read(4)
    if len(kind) < 4 or kind[:2] != b"\0\0" or kind[2] not in _DTYPES:
        raise DataError(f"{path}: got the header {kind.hex(' ') or 'nothing'}, wanted an IDX file (00 00 08 ..)")
    extents = read(4 * kind[3])
    start = 4 + 4 * kind[3]
    if len(extents) < 4 * kind[3]:
        raise DataError(f"{path}: got {4 + len(extents)} bytes, wanted a header of {start}; download the file again")
    return tuple(int(n) for n in np.frombuffer(extents, ">u4")), np.dtype(_DTYPES[kind[2]]), start
