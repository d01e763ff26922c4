"""Arrays whose chunk files hold plain rows, perhaps compressed, so that they can be read without Zarr.

Zarr reads and writes a chunk through its event loop and several threads. If the process computes meanwhile, each switch
waits for the interpreter lock; small chunks that are read and written often, such as weights, pass through here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from zarr.storage import LocalStore

from dask_isgd.storage.backends.folder import temporary_name
from dask_isgd.storage.backends.stores import Array
from dask_isgd.storage.backends.zarr_internals import chunk_key, plain_bytes

_CHECKSUM_BYTES = 4
_RESIDUE = 0x48674BC7
"""CRC-32C of any bytes that are followed by their own CRC-32C."""


@dataclass(frozen=True)
class RawArray:
    """The position of the rows of a local array in its files, or in the bytes that these decompress to.

    Row ``i`` of the array is row ``i % rows`` of the file of chunk ``i // rows``. The file of a last, partial
    chunk is as large as all others; it is padded past the array's end.
    """

    root: Path
    keys: tuple[str, ...]
    """File of each chunk, relative to ``root``."""
    rows: int
    """Rows per chunk."""
    dtype: np.dtype
    """The dtype as stored, in the byte order of the files."""
    row_shape: tuple[int, ...]
    checksum: bool
    """Whether a CRC-32C follows the rows of each chunk."""
    fill: object
    """The value of all elements of a chunk without a file."""
    decompress: Callable[[memoryview], bytes] | None = None
    """What the bytes of a file must be passed to; None if they are not compressed."""

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """Size of every chunk's file if it is not compressed."""
        return self.rows * self.row_bytes + (_CHECKSUM_BYTES if self.checksum else 0)

    def path(self, chunk: int) -> Path:
        return self.root / self.keys[chunk]

    def read(self, chunk: int) -> np.ndarray:
        """All rows of one chunk, (rows, *row_shape); ValueError if they are not the bytes that were written."""
        try:
            return self.decode(self.path(chunk).read_bytes())
        except FileNotFoundError:
            return np.full((self.rows, *self.row_shape), self.fill, self.dtype)

    def decode(self, data: bytes) -> np.ndarray:
        """The rows of one chunk, (rows, *row_shape), from the bytes of its file.

        Raises ValueError, or whatever the codec raises, if they are not the bytes that were written.
        """
        if self.checksum and google_crc32c.value(data) != _RESIDUE:
            raise ValueError("the checksum does not match")
        stored = memoryview(data)[: len(data) - _CHECKSUM_BYTES * self.checksum]
        rows = stored if self.decompress is None else self.decompress(stored)
        if len(rows) != self.rows * self.row_bytes:
            raise ValueError(f"got {len(rows)} bytes, wanted {self.rows * self.row_bytes}")
        return np.frombuffer(rows, self.dtype).reshape(self.rows, *self.row_shape)

    def write(self, chunk: int, rows: np.ndarray) -> None:
        """Replace all rows of one chunk atomically; the last chunk may be shorter than the others."""
        whole = np.ascontiguousarray(rows, self.dtype)
        if len(whole) < self.rows:
            whole = np.full((self.rows, *self.row_shape), self.fill, self.dtype)
            whole[: len(rows)] = rows
        data = whole.tobytes()
        if self.checksum:
            data += google_crc32c.value(data).to_bytes(_CHECKSUM_BYTES, "little")
        path = self.path(chunk)
        partial = path.with_name(temporary_name(path.name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def raw_array(array: Array) -> RawArray | None:
    """Return the position of the rows of ``array`` in files; None if they are remote, sharded, split or filtered."""
    store = array.store
    if not isinstance(store, LocalStore) or array.dtype.kind not in "biufc" or not array.size:
        return None
    if array.shards is not None or tuple(array.chunks[1:]) != tuple(array.shape[1:]):
        return None
    plain = plain_bytes(array)
    if plain is None:
        return None
    dtype = np.dtype(array.dtype)
    if plain.byte_order != "=":
        dtype = dtype.newbyteorder(plain.byte_order)
    count = -(-array.shape[0] // array.chunks[0])
    others = (0,) * (array.ndim - 1)
    return RawArray(
        root=Path(store.root),
        keys=tuple(chunk_key(array, (i, *others)) for i in range(count)),
        rows=int(array.chunks[0]),
        dtype=dtype,
        row_shape=tuple(int(extent) for extent in array.shape[1:]),
        checksum=plain.checksum,
        fill=np.asarray(array.fill_value if array.fill_value is not None else 0, dtype.newbyteorder("=")).item(),
        decompress=plain.decompress,
    )
