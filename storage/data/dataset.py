"""A dataset: rows and chunks of the arrays of one Zarr group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.storage.backends.stores import Array, StorageOptions, open_store, opening, redact
from dask_isgd.storage.data.chunks import Chunks
from dask_isgd.storage.data.fingerprint import fingerprint
from dask_isgd.storage.data.layout import Layout, Normalisation, find_group, open_layout, read_normalisation
from dask_isgd.storage.data.raw import RawArray, raw_array
from dask_isgd.storage.data.sources import require_whole, source_of
from dask_isgd.storage.data.targets import check_target

if TYPE_CHECKING:
    import xarray

_BLOCK_BYTES = 8 << 20


Unreadable = Callable[[DataError], None]


class Rows(NamedTuple):
    """B examples: each input (B, ...) and the target (B, ...), in the dtypes of the store and native byte order."""

    inputs: tuple[np.ndarray, ...]
    target: np.ndarray


class Dataset:
    """A cheap handle on examples in Zarr: one or more input arrays and a target, one row per example.

    ``url`` is a local path or a URL; ``storage_options`` are obstore's for a cloud, fsspec's for others. It may also be
    a Zarr store, such as that of a read-only Icechunk session, a ``zarr.Group``, or an ``xarray.Dataset`` as
    ``open_zarr`` returns it; those travel to the workers as they are. ``group`` is
    the path of the group inside; None means the root, or ``train`` if the root holds no arrays.
    ``inputs`` (a name or names) and ``target`` (a name) default to the group's ``isgd`` attributes,
    then to names: the target is ``target``, ``label`` or ``y``, the inputs all other arrays along
    ``dimension``. A handle pickles small and opens again where it is unpickled.

    A chunk that is not in the store is an error: it would silently read as fill values. Many
    writers leave out chunks that hold nothing but the fill value; ``missing="fill"`` reads such a
    dataset, and cannot distinguish a lost chunk from an empty one.

    Raises EmptyDatasetError (no group or no arrays), DataError (ambiguous arrays, different chunks),
    LengthMismatchError; reading raises MissingChunkError and CorruptChunkError.
    """

    def __init__(
        self,
        url: str | Path | Store | zarr.Group | xarray.Dataset,
        *,
        group: str | None = None,
        inputs: str | Sequence[str] | None = None,
        target: str | None = None,
        dimension: str = "sample",
        missing: Literal["refuse", "fill"] = "refuse",
        storage_options: StorageOptions = None,
    ) -> None:
        if missing not in ("refuse", "fill"):
            raise DataError(f"missing: got {missing!r}, wanted 'refuse' or 'fill'")
        self._source = source_of(url)
        self.url = self._source.url
        self.missing = missing
        self.group = group.strip("/") if group is not None else None
        if self._source.group:
            self.group = f"{self._source.group}/{self.group or ''}".rstrip("/")
        self.dimension = dimension
        self._inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs) if inputs is not None else None
        self._target = target
        self._storage_options = dict(storage_options or {})
        self._opened: Layout | None = None
        self._reads: Chunks | None = None
        self._files: dict[str, RawArray | None] = {}
        layout = self._layout  # so that a wrong URL fails here, not in the first task
        if hasattr(url, "data_vars"):
            require_whole(url, [str(array.basename) for array in layout.arrays])

    @property
    def _layout(self) -> Layout:
        if self._opened is None:
            store = self._source.store
            if store is None:
                store = open_store(self.url, read_only=True, storage_options=self._storage_options)
            where = f"dataset {redact(self.url)}"
            with opening(where):
                self._opened = open_layout(store, self.group, self._inputs, self._target, self.dimension, where)
        return self._opened

    @property
    def _chunks(self) -> Chunks:
        if self._reads is None:
            layout, where = self._layout, f"dataset {redact(self.url)}"
            self._reads = Chunks(
                layout.store, where, length=self.length, size=self.chunk_size, fill=self.missing == "fill"
            )
        return self._reads

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_reads": None, "_files": {}}

    def __repr__(self) -> str:
        place = redact(self.url) + (f"/{self._layout.group}" if self._layout.group else "")
        arrays = [f"{array.basename} {array.dtype}{list(array.shape[1:])}" for array in self._layout.arrays]
        what = f"{' + '.join(arrays[:-1])} → {arrays[-1]}"
        return f"<Dataset {place}: {self.length} rows in {self.n_chunks} chunks, {what}>"

    def __len__(self) -> int:
        return self.length

    @property
    def length(self) -> int:
        """Number of examples."""
        return int(self._layout.target.shape[0])

    @property
    def chunk_size(self) -> int:
        """Rows per Zarr chunk; for a sharded array the inner chunk, the smallest unit that can be read."""
        return max(1, int(self._layout.target.chunks[0]))

    @property
    def n_chunks(self) -> int:
        return -(-self.length // self.chunk_size)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(array.basename for array in self._layout.inputs)

    @property
    def target_name(self) -> str:
        return str(self._layout.target.basename)

    @property
    def arrays(self) -> dict[str, Array]:
        """The open arrays by name, inputs first and target last, with their shapes, dtypes and codecs."""
        return {array.basename: array for array in self._layout.arrays}

    @property
    def raw(self) -> tuple[RawArray, ...] | None:
        """Position of the rows of each array, inputs first; None unless all are local, unsharded and uncompressed."""
        found = [raw_array(array) for array in self._layout.arrays]
        plain = tuple(array for array in found if array is not None and array.decompress is None)
        return plain if len(plain) == len(found) else None

    @property
    def local(self) -> bool:
        """Whether the store is a folder in this machine's file system."""
        return isinstance(self._layout.store, LocalStore)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What its writer recorded, such as ``classes``, ``class_names``, ``features``, ``categories``, ``filled``."""
        return self._layout.attributes

    @property
    def classes(self) -> int | None:
        """Number of classes, None if the dataset does not state it."""
        value = self._layout.attributes.get("classes")
        if value is not None and (type(value) is not int or value < 1):
            raise DataError(f"{self!r}: got classes {str(value)[:40]!r}, wanted a whole number; prepare the data again")
        return value

    @property
    def normalisation(self) -> Normalisation | None:
        """Per input (mean, std) as float32 that broadcast against one example; None if none is stored."""
        with opening(f"normalisation of {self!r}"):
            return read_normalisation(self._layout)

    @property
    def nbytes(self) -> int:
        """Size of all rows when decoded, in bytes."""
        return sum(array.size * array.dtype.itemsize for array in self._layout.arrays)

    def rows(self, indices: Any) -> Rows:
        """Return examples in the order of ``indices`` (B,), repeats allowed; each chunk is read once.

        Raises IndexError for anything but integers in [0, length).
        """
        indices = np.asarray(indices)
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise IndexError(f"rows: got indices {indices.dtype}{list(indices.shape)}, wanted integers (B,)")
        if indices.size and (indices.min() < 0 or indices.max() >= self.length):
            raise IndexError(
                f"rows: got indices from {indices.min()} to {indices.max()}, wanted 0 to {self.length - 1}"
            )
        order = np.argsort(indices, kind="stable")
        chunk_of = indices[order] // self.chunk_size
        parts = np.split(order, np.flatnonzero(np.diff(chunk_of)) + 1) if indices.size else []
        rows = self.empty(indices.size)
        taken = (*rows.inputs, rows.target)
        for part in parts:
            start, stop = self._chunks.bounds(int(indices[part[0]]) // self.chunk_size)
            for array, out in zip(self._layout.arrays, taken, strict=True):
                out[part] = self._chunks.read(array, start, stop)[indices[part] - start]
        return rows

    def read(self, start: int, stop: int) -> Rows:
        """Return examples ``start`` to ``stop`` (excluded) as contiguous arrays; IndexError outside the dataset."""
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"read: got rows {start} to {stop}, wanted bounds within 0 and {self.length}")
        taken = [self._chunks.read(array, start, stop) for array in self._layout.arrays]
        return Rows(tuple(taken[:-1]), taken[-1])

    def chunk(self, i: int) -> Rows:
        """Return the examples of chunk ``i``; the last may be shorter."""
        if not 0 <= i < self.n_chunks:
            raise IndexError(f"chunk: got {i}, wanted 0 to {self.n_chunks - 1}")
        return self.read(*self._chunks.bounds(i))

    def chunk_of_array(self, name: str, i: int) -> np.ndarray:
        """Return the rows (C, ...) of chunk ``i`` of one array; the last may be shorter. Not writable.

        Local chunks of whole rows, uncompressed or as zstd or blosc, are decoded without Zarr, which takes several
        times as long. Any number of threads may read at once.
        """
        start, stop = self._chunks.bounds(i)
        if name not in self._files:
            self._files[name] = raw_array(self.arrays[name])
        files = self._files[name]
        if files is not None:
            # A chunk that is missing or damaged is read again through Zarr, for the error that names it.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                rows = files.decode(files.path(i).read_bytes())[: stop - start]
                return rows.astype(rows.dtype.newbyteorder("="), copy=False)
        return self._chunks.read(self.arrays[name], start, stop)

    def load(self, unreadable: Unreadable | None = None) -> Rows:
        """Return all examples; this takes ``nbytes`` of memory and room for a few chunks.

        ``unreadable`` is called with the error of each chunk that is missing or corrupt, whose rows are then
        zero; without it the first such error is raised.
        """
        taken = [self.load_array(name, unreadable) for name in self.arrays]
        return Rows(tuple(taken[:-1]), taken[-1])

    def load_array(self, name: str, unreadable: Unreadable | None = None) -> np.ndarray:
        """Return all rows of one array; ``unreadable`` as in ``load``."""
        array = self.arrays[name]
        out = np.empty(array.shape, array.dtype.newbyteorder("="))
        step = self.chunk_size * max(1, _BLOCK_BYTES // max(1, out[: self.chunk_size].nbytes))
        for start in range(0, self.length, step):
            stop = min(start + step, self.length)
            while start < stop:
                try:
                    out[start:stop] = self._chunks.read(array, start, stop)
                    break
                except DataError as error:
                    if unreadable is None or error.rows is None:
                        raise
                    unreadable(error)
                    first, last = error.rows
                    out[start:first] = self._chunks.read(array, start, first)
                    out[first:last] = 0
                    start = last
        return out

    def empty(self, count: int) -> Rows:
        """Return arrays for ``count`` examples, their content undefined."""
        made = [np.empty((count, *a.shape[1:]), a.dtype.newbyteorder("=")) for a in self._layout.arrays]
        return Rows(tuple(made[:-1]), made[-1])

    def split(self, name: str) -> Dataset:
        """Return the sibling group ``name``, such as ``"validation"``; EmptyDatasetError lists those that exist."""
        parent = self._layout.group.rpartition("/")[0]
        group = f"{parent}/{name}" if parent else name
        find_group(self._layout.store, group, f"dataset {redact(self.url)}")
        return Dataset(
            self.url if self._source.store is None else self._source.store,
            group=group,
            inputs=self._inputs,
            target=self._target,
            dimension=self.dimension,
            missing=self.missing,
            storage_options=self._storage_options,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies this data, as plain JSON.

        Names, shapes, dtypes, rows per chunk, and sha256 of the decoded first, middle and last chunk:
        recompressing keeps it, another order of the rows does not. For a versioned store also its snapshot.
        """
        return {**fingerprint(self._chunks, self._layout.inputs, self._layout.target), **self._source.identity}

    def check(self, classes: int | None = None, *, classify: bool = True) -> None:
        """Refuse data on which training would fail: no examples, or labels outside the classes.

        Integer targets are class indices: the whole target is read, chunk by chunk, against
        ``classes`` (default: those of the dataset; else only negative ones are refused). Float
        targets are regression, refused if ``classes`` is given. Without ``classify``, and if
        no number of classes is known, integers are numbers like any other: counts, differences.
        Raises EmptyDatasetError, LabelError(min, max, classes, first index), MissingChunkError, CorruptChunkError.
        """
        if not self.length:
            raise EmptyDatasetError(f"{self!r} has no examples, wanted at least one. Check the split or the URL")
        check_target(self._chunks, self._layout.target, classes, self.classes, classify=classify)
