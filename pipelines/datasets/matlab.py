"""One variable of a MATLAB 5 file, read example by example, so that the file need not fit into memory.

A file is a header of 128 bytes and one element per variable, usually compressed. The last dimension of a
variable varies slowest: in an array of (height, width, colours, N) the bytes of an example are contiguous.
Layout: "MAT-File Format", MathWorks, R2019b, chapter 1.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError

_MATRIX, _COMPRESSED = 14, 15
_UINT8 = 2
_BLOCK = 1 << 20
_LONGEST_NAME = 256


class Variable:
    """A variable of bytes, whose examples are read in order, each of them once."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[int], bytes], path: Path) -> None:
        self.shape = shape
        """As in MATLAB, examples last."""
        self._read, self._path, self._left = read, path, shape[-1]

    def read(self, rows: int) -> NDArray[np.uint8]:
        """Return the next examples, at most ``rows``: (n, ..., width, height), the dimensions reversed."""
        n = min(rows, self._left)
        self._left -= n
        return np.frombuffer(self._read(n * math.prod(self.shape[:-1])), np.uint8).reshape(n, *self.shape[-2::-1])


def open_variable(file: BinaryIO, path: Path, name: str) -> Variable | None:
    """Return the variable ``name`` of bytes in an open file; None if no variable has this name.

    Raises DataError if the file is of another kind or truncated, here or while examples are read.
    """
    header = file.read(128)
    if len(header) < 128 or header[126:128] not in (b"IM", b"MI"):
        raise _broken(path, "it has no header of MATLAB 5")
    order = "<" if header[126:128] == b"IM" else ">"
    while tag := file.read(8):
        if len(tag) < 8:
            raise _broken(path, "it is truncated")
        kind, size = struct.unpack(f"{order}II", tag)
        following = file.tell() + size + (-size % 8 if kind != _COMPRESSED else 0)
        if kind in (_MATRIX, _COMPRESSED):
            read = _exactly(_inflated(file, size) if kind == _COMPRESSED else _plain(file, size), path)
            if kind == _COMPRESSED:
                read(8)  # skip the tag of the matrix inside
            try:
                variable = _matrix(read, order, path, name)
            except (ValueError, struct.error) as error:
                if isinstance(error, DataError):
                    raise
                raise _broken(path, str(error)) from error
            if variable is not None:
                return variable
        file.seek(following)
    return None


def _matrix(read: Callable[[int], bytes], order: str, path: Path, name: str) -> Variable | None:
    def element(limit: int) -> bytes:
        kind, size = struct.unpack(f"{order}II", read(8))
        if kind >> 16:  # a small element has its size, kind and up to four bytes of content in the tag
            return struct.pack(f"{order}I", size)[: kind >> 16]
        if size > limit:
            raise _broken(path, f"it has an element of {size:,} bytes, at most {limit:,} are expected")
        return read(size + -size % 8)[:size]

    element(8)  # flags
    dimensions = np.frombuffer(element(64), f"{order}i4").tolist()
    if element(_LONGEST_NAME).decode("ascii", "replace") != name:
        return None
    kind, size = struct.unpack(f"{order}II", read(8))
    if kind >> 16:
        read = io.BytesIO(struct.pack(f"{order}I", size)).read
        kind, size = kind & 0xFFFF, kind >> 16
    shape = tuple(int(n) for n in dimensions)
    if kind != _UINT8 or size != math.prod(shape):
        raise DataError(f"{path}: got {name} of type {kind} and {size:,} bytes, wanted uint8{shape}")
    return Variable(shape, read, path)


def _exactly(blocks: Iterator[bytes], path: Path) -> Callable[[int], bytes]:
    held = bytearray()

    def read(count: int) -> bytes:
        try:
            while len(held) < count:
                held.extend(next(blocks))
        except StopIteration:
            raise _broken(path, "it is truncated") from None
        except zlib.error as error:
            raise _broken(path, str(error)) from error
        taken = bytes(memoryview(held)[:count])
        del held[:count]
        return taken

    return read


def _plain(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        size -= len(block)
        yield block


def _inflated(file: BinaryIO, size: int) -> Iterator[bytes]:
    unpack = zlib.decompressobj()
    for packed in _plain(file, size):
        while packed:
            yield unpack.decompress(packed, _BLOCK)  # never unpacks more than this at once
            packed = unpack.unconsumed_tail
    yield unpack.flush()
    if not unpack.eof:
        raise zlib.error("incomplete")


def _broken(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: cannot be read as a MATLAB file ({reason}); download the file again")
