"""The weight of every example, and when each chunk of them was scored."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from dask_isgd.errors import CorruptChunkError, DataError, RunNotFoundError
from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.stores import (
    Array,
    StorageOptions,
    consolidate,
    decoding,
    has_key,
    normalise,
    open_folder,
    open_store,
    opening,
    redact,
)
from dask_isgd.storage.backends.zarr_internals import plain_bytes
from dask_isgd.storage.data.raw import RawArray, raw_array

logger = logging.getLogger(__name__)

STAMPS_PER_CHUNK = 65_536
FORMAT_VERSION = 1
FIELDS = ("version", "incarnation", "time")
# The checksum prevents a flipped bit from being read as a weight.
_AS_WRITTEN: dict[str, Any] = {
    "compressors": [Crc32cCodec()],
    "filters": None,
    "fill_value": float("nan"),
}


class WeightArray:
    """Weights in a Zarr group that xarray opens: ``weight`` (n,) f4 and ``stamp`` (n_chunks, 3) f8.

    NaN means never scored. A chunk of ``weight`` is a scoring chunk, uncompressed with a checksum;
    a single task always writes all of it, which is atomic on disks and in object stores. ``stamp`` holds version,
    incarnation and wall time (seconds since 1970) of each chunk's weights, and has one writer.
    A pickled handle is small.
    """

    def __init__(self, url: str | Path, n: int, chunk_size: int, *, storage_options: StorageOptions = None) -> None:
        self.url = normalise(url)
        self.n = int(n)
        """Number of examples."""
        self.chunk_size = int(chunk_size)
        """Examples per scoring chunk; the last may be shorter."""
        self._storage_options = dict(storage_options or {})
        self._opened: tuple[Array, Array] | None = None
        self._files: RawArray | None = None

    @classmethod
    def create(cls, url: str | Path, n: int, chunk_size: int, *, storage_options: StorageOptions = None) -> WeightArray:
        """Create an array without scores. Raises ValueError if one exists."""
        if n < 1 or chunk_size < 1:
            raise ValueError(f"weights: got n={n}, chunk_size={chunk_size}, wanted both at least 1")
        weights = cls(url, n, chunk_size, storage_options=storage_options)
        store = open_store(weights.url, read_only=False, storage_options=weights._storage_options)
        with writing(redact(weights.url)):
            try:
                group = zarr.create_group(store, attributes={"isgd": {"format_version": FORMAT_VERSION}}, zarr_format=3)
            except zarr.errors.ContainsGroupError:
                raise ValueError(f"weights exist at {redact(weights.url)}; open them or choose another URL") from None
            group.create_array(
                "stamp",
                shape=(weights.n_chunks, len(FIELDS)),
                chunks=(min(STAMPS_PER_CHUNK, weights.n_chunks), len(FIELDS)),
                dtype="f8",
                dimension_names=("chunk", "field"),
                attributes={"fields": list(FIELDS)},
                **_AS_WRITTEN,
            )
            group.create_array(
                "weight",
                shape=(weights.n,),
                chunks=(weights.chunk_size,),
                dtype="f4",
                dimension_names=("sample",),
                **_AS_WRITTEN,
            )
            consolidate(store)
        return weights

    @classmethod
    def open(cls, url: str | Path, *, storage_options: StorageOptions = None) -> WeightArray:
        """Open the array at ``url``. Raises RunNotFoundError if there is none, DataError if it is damaged."""
        weights = cls(url, 1, 1, storage_options=storage_options)
        weight, _ = weights._arrays
        weights.n, weights.chunk_size = int(weight.shape[0]), int(weight.chunks[0])
        return weights

    @property
    def _arrays(self) -> tuple[Array, Array]:
        if self._opened is None:
            store = open_store(self.url, read_only=False, storage_options=self._storage_options)
            # This check comes first, because opening a local store for writing creates its folder.
            if not all(has_key(store, f"{name}/zarr.json") for name in ("weight", "stamp")):
                raise RunNotFoundError(
                    f"no weights at {redact(self.url)}; wanted a group with 'weight' and 'stamp'. Check the URL"
                )
            # Each array is opened by itself, because listing a group warns about other writers' temporary files.
            with opening(redact(self.url), "delete it and resume: every chunk is scored again"):
                weight, stamp = (zarr.open_array(store, path=n, mode="r+", zarr_format=3) for n in ("weight", "stamp"))
                self._require_layout(weight, stamp)
            self._opened = weight, stamp
        return self._opened

    @staticmethod
    def _require_layout(weight: Array, stamp: Array) -> None:
        """Refuse what `create` does not make: its chunks would be read and written as something else."""
        for array, dtype, shape in (
            (weight, np.float32, weight.shape[:1]),
            (stamp, np.float64, (-(-weight.shape[0] // weight.chunks[0]), len(FIELDS))),
        ):
            plain = plain_bytes(array)
            if array.dtype != dtype or array.shape != shape or array.shards or plain is None or not plain.checksum:
                raise ValueError(f"got {array.path!r} {array.dtype}{list(array.shape)}, wanted {dtype.__name__}{shape}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_files": None}

    def __repr__(self) -> str:
        return f"<WeightArray {redact(self.url)}: {self.n} weights in {self.n_chunks} chunks of {self.chunk_size}>"

    @property
    def n_chunks(self) -> int:
        return -(-self.n // self.chunk_size)

    def exists(self) -> bool:
        """Return whether the store still has the array."""
        return has_key(self._arrays[0].store, "weight/zarr.json")

    def bounds(self, chunk: int) -> tuple[int, int]:
        """Return the first example of a chunk and the one after its last; ValueError if there is no such chunk."""
        if not 0 <= chunk < self.n_chunks:
            raise ValueError(f"weights: got chunk {chunk}, wanted 0 to {self.n_chunks - 1}")
        start = int(chunk) * self.chunk_size
        return start, min(start + self.chunk_size, self.n)

    def write(self, chunk: int, weights: npt.ArrayLike) -> None:
        """Write all weights of one chunk: (stop - start,) real numbers that fit float32.

        Raises ValueError before anything is written, StorageFullError.
        """
        start, stop = self.bounds(chunk)
        values = _cast(weights, np.float32, (stop - start,), f"weights of chunk {chunk}")
        files = self._on_disk()
        with writing(redact(self.url)):
            if files is None:
                self._arrays[0][start:stop] = values
            else:
                files.write(chunk, values)

    def read(self, chunk: int) -> npt.NDArray[np.float32]:
        """Return the weights of one chunk; NaN means never scored. CorruptChunkError if the checksum fails."""
        start, stop = self.bounds(chunk)
        files = self._on_disk()
        with decoding(f"{redact(self.url)}: array 'weight', chunk {chunk}", "a resumed run scores it again"):
            found = self._arrays[0][start:stop] if files is None else files.read(chunk)[: stop - start]
            return np.array(found, np.float32)

    def read_all(self) -> npt.NDArray[np.float32]:
        """Return all weights (n,); a corrupt chunk reads as never scored, with a warning in the log."""
        at_once = self._on_disk() is None  # Zarr requests many chunks from a store at a time
        return self._whole(self._arrays[0], self.read, np.float32, self.chunk_size, at_once)

    def write_stamps(self, stamps: npt.ArrayLike) -> None:
        """Write all stamps (n_chunks, 3): version, incarnation, wall time; NaN means never. Only one writer may."""
        values = _cast(stamps, np.float64, (self.n_chunks, len(FIELDS)), "stamps")
        with writing(redact(self.url)):
            self._arrays[1][...] = values

    def read_stamps(self) -> npt.NDArray[np.float64]:
        """Return all stamps (n_chunks, 3) f8; a corrupt chunk reads as never scored, with a warning in the log."""
        stamp = self._arrays[1]

        def read(i: int) -> np.ndarray:
            with decoding(f"{redact(self.url)}: array 'stamp', chunk {i}", "a resumed run scores its chunks again"):
                return np.asarray(stamp[i * STAMPS_PER_CHUNK : (i + 1) * STAMPS_PER_CHUNK])

        return self._whole(stamp, read, np.float64, STAMPS_PER_CHUNK, at_once=True)

    def sweep(self, seconds: float | None = None) -> list[str]:
        """Remove and return temporary files that killed writers left more than ``seconds`` ago."""
        return open_folder(self.url, self._storage_options).sweep(seconds, recursive=True)

    def _on_disk(self) -> RawArray | None:
        """Return how to read and write the weights without Zarr; None unless they are local files."""
        if self._files is None:
            self._files = raw_array(self._arrays[0])
        return self._files

    def _whole(
        self, array: Array, read: Callable[[int], np.ndarray], dtype: Any, size: int, at_once: bool
    ) -> np.ndarray:
        with contextlib.suppress(CorruptChunkError), decoding(array.path):
            if at_once:
                return np.asarray(array[...], dtype)
        found = np.full(array.shape, np.nan, dtype)
        for i in range(-(-array.shape[0] // size)):
            try:
                found[i * size : (i + 1) * size] = read(i)
            except DataError as error:
                logger.warning("%s; it counts as never scored", error)
        return found


def _cast(values: npt.ArrayLike, dtype: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Refuse what Zarr would silently accept: another shape, complex, object, text, overflow."""
    given = np.asarray(values)
    if given.shape != shape:
        raise ValueError(f"{what}: got shape {given.shape}, wanted {shape}; nothing was written")
    if given.dtype.kind not in "fiub":
        raise ValueError(f"{what}: got {given.dtype}, wanted real numbers; nothing was written")
    with np.errstate(over="ignore"):
        cast = given.astype(dtype)
    if given.dtype.kind == "f" and (np.isinf(cast) & ~np.isinf(given)).any():
        raise ValueError(f"{what}: got values beyond {np.dtype(dtype)}, wanted finite ones; nothing was written")
    return cast
