"""One variable of a MATLAB 5 file, example after example, without the file ever being in memory.

A file is a header of 128 bytes and elements, one a variable, as a rule compressed. The last dimension
of a variable varies slowest: in an array of (height, width, colours, N) an example lies in one piece.
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
    """A variable of bytes; reads are in order, each example once."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[int], bytes], path: Path) -> None:
        self.shape = shape
        """As MATLAB has it, examples last."""
        self._read, self._path = read, path

    def examples(self, rows: int) -> Iterator[NDArray[np.uint8]]:
        """All examples, ``rows`` at a time: (n, ..., width, height), the dimensions reversed."""
        size, count = math.prod(self.shape[:-1]), self.shape[-1]
        for start in range(0, count, rows):
            n = min(rows, count - start)
            yield np.frombuffer(self._read(n * size), np.uint8).reshape(n, *self.shape[-2::-1])


def open_variable(file: BinaryIO, path: Path, name: str) -> Variable | None:
    """The variable ``name`` of bytes in an open file; None where there is none of this name.

    Raises DataError where the file is none of the kind or cut short, here or while examples are read.
    """
    header = file.read(128)
    if len(header) < 128 or header[126:128] not in (b"IM", b"MI"):
        raise _broken(path, "no header of MATLAB 5")
    order = "<" if header[126:128] == b"IM" else ">"
    while tag := file.read(8):
        if len(tag) < 8:
            raise _broken(path, "cut short")
        kind, size = struct.unpack(f"{order}II", tag)
        following = file.tell() + size + (-size % 8 if kind != _COMPRESSED else 0)
        if kind in (_MATRIX, _COMPRESSED):
            read = _exactly(_inflated(file, size) if kind == _COMPRESSED else _plain(file, size), path)
            if kind == _COMPRESSED:
                read(8)  # the tag of the matrix inside
            variable = _matrix(read, order, path, name)
            if variable is not None:
                return variable
        file.seek(following)
    return None


def _matrix(read: Callable[[int], bytes], order: str, path: Path, name: str) -> Variable | None:
    def element(most: int) -> bytes:
        kind, size = struct.unpack(f"{order}II", read(8))
        if kind >> 16:  # a small one: size, kind and up to four bytes of content in the tag
            return struct.pack(f"{order}I", size)[: kind >> 16]
        if size > most:
            raise _broken(path, f"an element of {size:,} bytes where {most:,} are the most")
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
            raise _broken(path, "cut short") from None
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
            yield unpack.decompress(packed, _BLOCK)  # never more than this at once, whatever was packed
            packed = unpack.unconsumed_tail
    yield unpack.flush()
    if not unpack.eof:
        raise zlib.error("incomplete")


def _broken(path: Path, why: str) -> DataError:
    return DataError(f"{path}: cannot be read as a MATLAB file ({why}); get the file anew")
