"""The IDX format of the MNIST family: big-endian arrays behind a header of a few bytes."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def read_idx(path: str | Path, *, limit: int = 1 << 30) -> NDArray[Any]:
    """The array of an IDX file, gzipped or not, in the byte order of this machine.

    Never more than ``limit`` bytes are unpacked. A :class:`DataError` says what is wrong with a file
    that is cut short, too long or none of the kind.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file anew") from error
    if len(content) > limit:
        raise DataError(f"{path}: got more than {limit:,} bytes; is it the right file?")
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise DataError(f"{path}: got the header {content[:4].hex(' ') or 'nothing'}, wanted an IDX file (00 00 08 ..)")
    dtype, rank = np.dtype(_DTYPES[content[2]]), content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise DataError(f"{path}: got {len(content)} bytes, wanted a header of {start}; get the file anew")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, offset=4))
    wanted = start + math.prod(shape) * dtype.itemsize
    if len(content) != wanted:
        raise DataError(f"{path}: got {len(content):,} bytes, wanted {wanted:,} for shape {shape}; get the file anew")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
