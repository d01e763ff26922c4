"""One value or vector per example, such as its score or the model's output, written chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from dask_isgd.errors import RunExistsError, RunNotFoundError
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

_WRITTEN = "written"
_AXES = ("sample", "class", "dim_2", "dim_3", "dim_4", "dim_5")


class OutputArray:
    """A Zarr group that xarray opens: ``name`` (n, ...) float32, NaN where nothing is known, and ``written``.

    A chunk is written whole, by one task; ``written`` (n_chunks,) has one writer and tells which chunks are there.
    A pickled handle is small.
    """

    def __init__(self, url: str | Path, *, storage_options: StorageOptions = None) -> None:
        self.url = normalise(url)
        self._storage_options = dict(storage_options or {})
        self._opened: tuple[Array, Array, dict[str, Any]] | None = None

    @classmethod
    def create(
        cls,
        url: str | Path,
        name: str,
        shape: tuple[int, ...],
        chunk_size: int,
        about: Mapping[str, Any],
        *,
        storage_options: StorageOptions = None,
    ) -> OutputArray:
        """Create a group in which nothing is written; ``about`` it is plain JSON.

        An earlier output is removed, and nothing else: RunExistsError if there is anything else at ``url``.
        """
        output = cls(url, storage_options=storage_options)
        folder = open_folder(output.url, output._storage_options)
        former = {"zarr.json", _WRITTEN, output.about["name"]} if output.exists else set()
        others = sorted(set(folder.names()) - former)
        if others:
            raise RunExistsError(f"{redact(output.url)} holds {', '.join(others[:5])}; choose a URL with nothing there")
        for part in sorted(former):
            folder.remove(part)
        output = cls(url, storage_options=storage_options)
        store = open_store(output.url, read_only=False, storage_options=output._storage_options)
        settings: dict[str, Any] = {"compressors": [Crc32cCodec()], "filters": None}
        with writing(redact(output.url)):
            attributes = {"isgd": {**about, "name": name}}
            group = zarr.create_group(store, attributes=attributes, zarr_format=3)
            group.create_array(
                name,
                shape=shape,
                chunks=(chunk_size, *shape[1:]),
                dtype="f4",
                fill_value=float("nan"),
                dimension_names=_AXES[: len(shape)],
                **settings,
            )
            count = -(-shape[0] // chunk_size)
            group.create_array(
                _WRITTEN, shape=(count,), chunks=(count,), dtype="u1", dimension_names=("chunk",), **settings
            )
            consolidate(store)
        return output

    @property
    def exists(self) -> bool:
        """Whether there is such a group."""
        store = open_store(self.url, read_only=True, storage_options=self._storage_options)
        return has_key(store, f"{_WRITTEN}/zarr.json")

    def _open(self) -> tuple[Array, Array, dict[str, Any]]:
        if self._opened is None:
            if not self.exists:
                raise RunNotFoundError(f"no output at {redact(self.url)}; was it deleted while it was written?")
            store = open_store(self.url, read_only=False, storage_options=self._storage_options)
            with opening(redact(self.url), "delete it and begin again"):
                group = zarr.open_group(store, mode="r+", zarr_format=3)
                about: Any = dict(group.attrs)["isgd"]
                values, written = (zarr.open_array(store, path=n, mode="r+") for n in (about["name"], _WRITTEN))
            self._opened = values, written, about
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def about(self) -> dict[str, Any]:
        """What the group was created for."""
        return self._open()[2]

    @property
    def chunk_size(self) -> int:
        return int(self._open()[0].chunks[0])

    def _bounds(self, chunk: int) -> slice:
        return slice(chunk * self.chunk_size, (chunk + 1) * self.chunk_size)

    def write(self, chunk: int, values: npt.NDArray[np.float32]) -> None:
        """Write one chunk as a whole, (rows, ...) float32. Raises ValueError for another shape, StorageFullError."""
        array = self._open()[0]
        rows = min(self.chunk_size, array.shape[0] - chunk * self.chunk_size)
        if values.shape != (rows, *array.shape[1:]):
            raise ValueError(f"chunk {chunk}: got shape {values.shape}, wanted {(rows, *array.shape[1:])}")
        with writing(redact(self.url)):
            array[self._bounds(chunk)] = values

    def read(self, chunk: int) -> npt.NDArray[np.float32]:
        """Return one chunk; NaN where nothing is known. Raises CorruptChunkError."""
        with decoding(f"{redact(self.url)}: chunk {chunk}", "delete it and begin again"):
            return np.asarray(self._open()[0][self._bounds(chunk)], np.float32)

    def read_written(self) -> npt.NDArray[np.bool_]:
        """Return (n_chunks,) which chunks are there."""
        with decoding(f"{redact(self.url)}: array {_WRITTEN!r}", "delete it and begin again"):
            return np.asarray(self._open()[1][...]).astype(bool)

    def mark_written(self, written: npt.NDArray[np.bool_]) -> None:
        """Record which chunks are there, (n_chunks,); only one writer may."""
        with writing(redact(self.url)):
            self._open()[1][...] = written.astype(np.uint8)
