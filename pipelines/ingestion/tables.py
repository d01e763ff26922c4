"""What can be ingested, as tables: named columns that share a first dimension and are read a block at a time."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import mmap
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from dask.utils import format_bytes
from numpy.typing import NDArray

from dask_isgd.errors import DataError, EmptyDatasetError, LengthMismatchError
from dask_isgd.storage.data.writing import Column

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_SAMPLED = 4


class Table(Protocol):
    """Rows that need not fit into memory. Pickles, to be read by the workers of a cluster."""

    length: int

    @property
    def columns(self) -> Mapping[str, Column]:
        """Shape and dtype of each."""

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Rows ``start`` to ``stop`` (excluded) of some columns."""

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """Spans that cover all rows in order, of ``rows`` at most where the source allows."""


def fingerprint(table: Table, names: Sequence[str]) -> dict[str, Any]:
    """What tells a table from another, as JSON: shapes, dtypes, and a hash of the first and the last rows."""
    digest = hashlib.sha256()
    for start, stop in ((0, min(_SAMPLED, table.length)), (max(0, table.length - _SAMPLED), table.length)):
        for name, values in sorted(table.read(start, stop, names).items()):
            digest.update(name.encode())
            digest.update(repr(values.tolist()).encode() if values.dtype.kind in "OUST" else values.tobytes())
    columns = {name: [str(table.columns[name].dtype), list(table.columns[name].shape)] for name in names}
    described: dict[str, Any] = json.loads(
        json.dumps({"length": table.length, "columns": columns, "sampled": digest.hexdigest()})
    )
    return described


def even_blocks(length: int, rows: int) -> list[tuple[int, int]]:
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


class XarrayTable:
    """The variables of an ``xarray.Dataset`` that have ``dimension``, wherever in their shape it stands."""

    def __init__(self, data: Any, dimension: str) -> None:
        if dimension not in data.sizes:
            raise DataError(
                f"got the dimensions {', '.join(map(repr, data.sizes)) or 'none'}, wanted {dimension!r} among them; "
                "pass dimension=..., the one that counts the examples"
            )
        self._dimension = dimension
        found = {str(name): variable for name, variable in data.variables.items() if dimension in variable.dims}
        self._data = data[[name for name in data.variables if str(name) in found]].reset_coords()
        self.length = int(data.sizes[dimension])
        self.columns = {
            name: Column(tuple(n for d, n in zip(v.dims, v.shape, strict=True) if d != dimension), np.dtype(v.dtype))
            for name, v in found.items()
        }

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        import dask

        with dask.config.set(scheduler="synchronous"):  # this may itself be a task
            part = self._data[list(names)].isel({self._dimension: slice(start, stop)})
            return {name: np.asarray(part[name].transpose(self._dimension, ...).values) for name in names}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)


class ArrayTable:
    """Arrays (N, ...) by name, in memory or mapped from files; whatever has a shape, a dtype and slices."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = {str(n): v if hasattr(v, "dtype") else np.asarray(v) for n, v in arrays.items()}
        single = [name for name, values in self._arrays.items() if len(values.shape) < 1]
        if single or not self._arrays:
            raise DataError(f"source: got single numbers {single}, or no arrays; wanted arrays (N, ...)")
        lengths = {name: len(values) for name, values in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise LengthMismatchError(f"got arrays of lengths {lengths}, wanted the same for all")
        self.length = next(iter(lengths.values()))
        self.columns = {n: Column(tuple(v.shape[1:]), np.dtype(v.dtype)) for n, v in self._arrays.items()}

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found = {}
        for name in names:
            values = self._arrays[name]
            found[name] = np.array(values[start:stop])
            mapped = getattr(values, "_mmap", None)
            if mapped is not None and getattr(values, "mode", "c") != "c" and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # else a file read through counts as this process's memory
        return found

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)


class ImageTable:
    """Images in a folder a class, ``FOLDER/CLASS/NAME.png``: ``image`` (N, colours, height, width) u1, and ``label``.

    ``size`` is (height, width); None means that all have one, which is checked. ``mode`` is ``"RGB"``
    or ``"L"`` for grey. Needs Pillow. Classes are numbered in the order of their names.
    """

    def __init__(self, folder: str | Path, *, size: Sequence[int] | None = None, mode: str = "RGB") -> None:
        root = Path(folder)
        self.names = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        found = [(path, label) for label, name in enumerate(self.names) for path in sorted((root / name).rglob("*"))]
        self._files = [(str(path), label) for path, label in found if path.suffix.lower() in IMAGES]
        if not self._files:
            raise EmptyDatasetError(f"{root}: got no images, wanted FOLDER/CLASS/NAME.png (or {', '.join(IMAGES[1:])})")
        if mode not in ("RGB", "L"):
            raise DataError(f"images: got mode {mode!r}, wanted 'RGB' or 'L'")
        self._mode, self._resized = mode, size is not None
        self._size = (int(size[0]), int(size[1])) if size is not None else self._open(0)[1:]
        self.length = len(self._files)
        colours = 3 if mode == "RGB" else 1
        self.columns = {
            "image": Column((colours, *self._size), np.dtype("u1")),
            "label": Column((), np.dtype("i8")),
        }

    def _open(self, i: int) -> tuple[Any, int, int]:
        try:
            from PIL import Image
        except ImportError as error:
            raise DataError("image folders need Pillow: pip install pillow") from error
        path = self._files[i][0]
        try:
            with Image.open(path) as image:  # which refuses what the header says has far too many pixels
                converted = image.convert(self._mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as an image ({error}); remove it or get it anew") from error
        return converted, converted.height, converted.width

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        if "label" in names:
            found["label"] = np.array([label for _, label in self._files[start:stop]], np.int64)
        if "image" in names:
            found["image"] = np.empty((stop - start, *self.columns["image"].shape), np.uint8)
            for i in range(start, stop):
                image, height, width = self._open(i)
                if (height, width) != self._size:
                    if not self._resized:
                        raise DataError(
                            f"{self._files[i][0]}: got {height}×{width} pixels, wanted {self._size[0]}×{self._size[1]} "
                            "as the first image has; pass size=(height, width) to have them resized"
                        )
                    image = image.resize((self._size[1], self._size[0]))
                pixels = np.asarray(image, np.uint8)
                found["image"][i - start] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        return found

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)


class ParquetTable:
    """Parquet files through ``dask.dataframe``: a column each, or several side by side as one array.

    ``features`` maps a new array's name to the columns it is made of, (N, columns) in their common dtype.
    A column of lists of one length becomes an array (N, length). Needs pyarrow.
    """

    def __init__(self, url: str, *, features: Mapping[str, Sequence[str]] | None = None) -> None:
        import dask
        import dask.dataframe as dd

        paths = sorted(glob.glob(url)) if "://" not in url else url
        if not paths:
            raise EmptyDatasetError(f"{url}: got no files, wanted Parquet; check the path")
        self._frame = dd.read_parquet(paths, split_row_groups="adaptive", index=False)
        self._features = {name: list(columns) for name, columns in (features or {}).items()}
        absent = [c for columns in self._features.values() for c in columns if c not in self._frame.columns]
        if absent:
            raise DataError(f"{url}: got no columns {absent}; there are {list(self._frame.columns)}")
        with dask.config.set(scheduler="synchronous"):
            lengths = [int(n) for n in self._frame.map_partitions(len).compute()]
        self._edges = np.concatenate([[0], np.cumsum(lengths)])
        self.length = int(self._edges[-1])
        sample = self._partition(int(np.argmax(lengths)), [*self._frame.columns, *self._features], 1)
        self.columns = {name: Column(values.shape[1:], values.dtype) for name, values in sample.items()}

    def _partition(self, i: int, names: Sequence[str], rows: int | None = None) -> dict[str, NDArray[Any]]:
        wanted = [c for name in names for c in self._features.get(name, [name])]
        part = self._frame[list(dict.fromkeys(wanted))].partitions[i]
        frame = part.compute(scheduler="synchronous")
        if rows is not None:
            frame = frame.head(rows)
        return {name: _values(frame, self._features.get(name, name)) for name in names}

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        first, last = np.searchsorted(self._edges, [start, max(start, stop - 1)], side="right") - 1
        parts = []
        for i in range(int(first), min(int(last), len(self._edges) - 2) + 1):
            rows = slice(max(0, start - int(self._edges[i])), max(0, stop - int(self._edges[i])))
            parts.append({name: values[rows] for name, values in self._partition(i, names).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        # Never across partitions: each is decoded for every block that touches it.
        spans = [(int(a), int(b)) for a, b in zip(self._edges, self._edges[1:], strict=False) if a < b]
        return [(a + c, a + d) for a, b in spans for c, d in even_blocks(b - a, rows)]


def _values(frame: Any, columns: str | list[str]) -> NDArray[Any]:
    if isinstance(columns, list):
        return np.ascontiguousarray(frame[columns].to_numpy())
    series = frame[columns]
    if series.dtype.kind == "O" and len(series) and isinstance(series.iloc[0], (list, np.ndarray)):
        lengths = {len(value) for value in series}
        if len(lengths) > 1:
            raise DataError(f"column {columns!r}: got lists of {sorted(lengths)[:5]} numbers, wanted one length")
        return np.stack([np.asarray(value) for value in series])
    return np.asarray(series.to_numpy())


def open_table(source: Any, *, dimension: str | None = None) -> Table:
    """A table of whatever ``source`` is.

    An ``xarray.Dataset``; a mapping of arrays; a table of this module; a mapping with one of ``xarray`` (a
    file or URL, with ``engine``, ``group``), ``numpy`` (an .npz file, or a mapping of .npy files), ``images`` (a
    folder, with ``size``, ``mode``) or ``parquet`` (files, with ``features``), as a YAML recipe has it.
    """
    if hasattr(source, "data_vars"):  # an xarray.Dataset; importing xarray to ask would take 100 MB
        return XarrayTable(source, dimension or "sample")
    if hasattr(source, "blocks"):
        table: Table = source
        return table
    if not isinstance(source, Mapping):
        raise DataError(
            f"source: got {type(source).__name__}, wanted an xarray.Dataset, a mapping of arrays, or one of "
            "xarray, numpy, images, parquet"
        )
    kinds: dict[str, Callable[..., Table]] = {
        "xarray": _from_xarray,
        "numpy": _from_numpy,
        "images": _from_images,
        "parquet": _from_parquet,
    }
    kind = next((kind for kind in kinds if isinstance(source.get(kind), (str, Path, Mapping))), None)
    if kind is None:
        return ArrayTable(source)
    options = {str(key): value for key, value in source.items() if key != kind}
    try:
        return kinds[kind](source[kind], dimension or "sample", **options)
    except TypeError as error:
        raise DataError(f"source {kind}: {error}") from error


def _from_xarray(place: Any, dimension: str, **options: Any) -> Table:
    import xarray

    try:
        text = str(place)
        if text.rstrip("/").endswith(".zarr") or options.get("engine") == "zarr":
            options = {"chunks": None, **options}
            options.pop("engine", None)
            return XarrayTable(xarray.open_zarr(text, **options), dimension)
        return XarrayTable(xarray.open_dataset(text, **options), dimension)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: cannot be opened by xarray ({error})") from error


def _from_numpy(place: Any, _: str) -> Table:
    try:
        if isinstance(place, Mapping):
            return ArrayTable({name: np.load(path, mmap_mode="r") for name, path in place.items()})
        _require_room(place)
        with np.load(place) as archive:
            return ArrayTable({name: archive[name] for name in archive.files})
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: cannot be read by numpy ({error})") from error


def _require_room(path: str | Path) -> None:
    """Refuse an .npz file that would unpack to more than its headers promise, or than there is memory."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # of these a few bytes may become gigabytes at once
                raise DataError(f"{path}: got {member.filename} in a compression that numpy never writes")
            with archive.open(member) as file:
                major, _ = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read_header(file)
                promised = file.tell() + math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and member.file_size != promised:  # numpy refuses objects itself
                raise DataError(
                    f"{path}: got {member.file_size:,} bytes for {member.filename}, wanted {promised:,} for {dtype}"
                    f"{list(shape)}; save it again"
                )
    size, room = sum(member.file_size for member in members), psutil.virtual_memory().available
    if size > room:
        raise DataError(
            f"{path}: got arrays of {format_bytes(size)} and {format_bytes(room)} of free memory, wanted them to "
            "fit; unpack it and name its files, which are read a block at a time: numpy: {name: name.npy, …}"
        )


def _from_images(place: Any, _: str, **options: Any) -> Table:
    return ImageTable(place, **options)


def _from_parquet(place: Any, _: str, **options: Any) -> Table:
    return ParquetTable(str(place), **options)
