"""Writing in-memory arrays as one split of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from dask_isgd.errors import DataError, EmptyDatasetError, LengthMismatchError
from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.stores import Array, StorageOptions, consolidate, open_store, redact
from dask_isgd.storage.data.layout import FORMAT_VERSION

_LONGEST_NAME = 128
INLINE = 64
"""Normalisation constants with more elements than this become separate arrays, not attributes."""


def write_dataset(
    url: str | Path,
    split: str,
    arrays: Mapping[str, np.ndarray],
    *,
    inputs: str | Sequence[str],
    target: str,
    chunk_size: int,
    classes: int | None = None,
    normalisation: Mapping[str, Mapping[str, Any]] | None = None,
    dimension: str = "sample",
    compressed: bool = False,
    storage_options: StorageOptions = None,
) -> None:
    """Write ``arrays`` (N, ...) as the group ``split`` of the dataset at ``url``, ``chunk_size`` rows per chunk.

    ``normalisation`` is ``{input: {"mean": ..., "std": ...}}``, numbers or arrays that broadcast
    against one example. Each chunk is written atomically with a checksum, and is compressed with zstd only if
    ``compressed``. The split as a whole is not atomic: to make it so, write to a temporary place and rename.
    Raises DataError (names, dtypes, an existing split), EmptyDatasetError, LengthMismatchError
    before anything is written; StorageFullError.
    """
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    _check(arrays, names, target, chunk_size, split)
    rows = {name: Column(values.shape[1:], values.dtype) for name, values in arrays.items()}
    constants = normalisation or {}
    _constants(constants, rows, names)
    made = create_split(
        url,
        split,
        rows,
        len(arrays[target]),
        chunk_size,
        dimension=dimension,
        compressed=compressed,
        storage_options=storage_options,
    )
    with writing(redact(url)):
        for name, values in arrays.items():
            made[name][...] = values
    attributes = {"inputs": names, "target": target, "classes": classes}
    finish_split(url, split, rows, attributes, constants, compressed=compressed, storage_options=storage_options)


class Column(NamedTuple):
    """One array of a split without its first dimension."""

    shape: tuple[int, ...]
    dtype: np.dtype


def create_split(
    url: str | Path,
    split: str,
    columns: Mapping[str, Column],
    length: int,
    chunk_size: int,
    *,
    dimension: str = "sample",
    compressed: bool = False,
    storage_options: StorageOptions = None,
) -> dict[str, Array]:
    """Create and return the arrays of a new split, which callers fill by whole chunks; `finish_split` completes it.

    Raises DataError if the split exists.
    """
    store = open_store(url, read_only=False, storage_options=storage_options)
    with writing(redact(url)):
        zarr.open_group(store, mode="a")
        try:
            group = zarr.create_group(store, path=split)
        except zarr.errors.ContainsGroupError:
            raise DataError(f"{redact(url)} already has a split {split!r}; remove it or write elsewhere") from None
        return {
            name: _create(
                group, name, (length, *row.shape), row.dtype, chunk_size, [dimension, *_axes(name, row)], compressed
            )
            for name, row in columns.items()
        }


def finish_split(
    url: str | Path,
    split: str,
    columns: Mapping[str, Column],
    attributes: Mapping[str, Any],
    normalisation: Mapping[str, Mapping[str, Any]],
    *,
    compressed: bool = False,
    storage_options: StorageOptions = None,
) -> None:
    """Record the role of each array, store the constants, and consolidate the metadata.

    ``attributes`` has ``inputs``, ``target`` and ``classes``, and anything else to be recorded, as plain JSON.
    """
    store = open_store(url, read_only=False, storage_options=storage_options)
    constants, beside = _constants(normalisation, columns, list(attributes["inputs"]))
    with writing(redact(url)):
        group = zarr.open_group(store, path=split, mode="a")
        for name, (values, dimensions) in beside.items():
            if name in group:  # an ingestion was interrupted after this point
                array: Any = group[name]
            else:
                array = _create(group, name, values.shape, values.dtype, None, dimensions, compressed)
            array[...] = values
        group.attrs["isgd"] = {"format_version": FORMAT_VERSION, **attributes, "normalisation": constants or None}
        consolidate(store, split)
        consolidate(store)  # xarray reads the metadata of the root even to open one of its groups


def _create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    rows: int | None,
    dimensions: Sequence[str],
    compressed: bool,
) -> Array:
    return group.create_array(
        name,
        shape=shape,
        # Chunks span complete rows, so that a chunk is one file and one read.
        chunks=tuple(max(1, extent) for extent in (rows or shape[0], *shape[1:])),
        dtype=dtype,
        compressors=[*([ZstdCodec(level=3)] if compressed else []), Crc32cCodec()],
        filters=None,
        dimension_names=tuple(dimensions),
        # A chunk of zeros must be distinguishable from one that was never written.
        config={"write_empty_chunks": True},
    )


def require_names(names: Iterable[str], what: str) -> None:
    """Raise DataError for a name that could not be the name of a folder beside others: it becomes one."""
    for name in names:
        if not name or name.startswith((".", "__")) or set(name) & set("/\\\0") or len(name.encode()) > _LONGEST_NAME:
            raise DataError(
                f"{what}: got the name {name[:80]!r}, wanted a name without slashes that begins neither with '.' nor "
                f"'__', of at most {_LONGEST_NAME} bytes; rename it"
            )


def _check(arrays: Mapping[str, np.ndarray], inputs: list[str], target: str, chunk_size: int, split: str) -> None:
    require_names(split.split("/"), "split")
    require_names(map(str, arrays), "arrays")
    if chunk_size < 1:
        raise DataError(f"got chunk_size={chunk_size}, wanted at least 1")
    absent = [name for name in (*inputs, target) if name not in arrays]
    if absent or target in inputs or not inputs:
        raise DataError(
            f"got inputs {inputs} and target {target!r} for the arrays {sorted(arrays)}; wanted each among them, once"
        )
    for name, values in arrays.items():
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf" or values.ndim < 1:
            raise DataError(
                f"array {name!r}: got {getattr(values, 'dtype', type(values).__name__)}, wanted a numpy array "
                "(N, ...) of booleans, integers or floats"
            )
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise LengthMismatchError(f"split {split!r}: got lengths {lengths}, wanted the same for all")
    if not lengths[target]:
        raise EmptyDatasetError(f"split {split!r}: got no examples, wanted at least one")


def _axes(name: str, row: Column) -> list[str]:
    return [f"{name}_{axis}" for axis in range(1, len(row.shape) + 1)]


def _constants(
    normalisation: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column], inputs: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[np.ndarray, list[str]]]]:
    """Return small constants as JSON, and large ones as arrays with the names of their dimensions."""
    entries: dict[str, dict[str, Any]] = {}
    beside: dict[str, tuple[np.ndarray, list[str]]] = {}
    for name, entry in normalisation.items():
        if name not in inputs or set(entry) != {"mean", "std"}:
            raise DataError(
                f"normalisation of {name!r}: got {sorted(entry)}, wanted 'mean' and 'std' of one of {inputs}"
            )
        example = columns[name].shape
        entries[name] = {}
        for kind, value in entry.items():
            values = np.asarray(value, np.float32)
            try:
                fits = np.broadcast_shapes(values.shape, example) == example
            except ValueError:
                fits = False
            if not fits or not np.isfinite(values).all() or (kind == "std" and (values <= 0).any()):
                raise DataError(
                    f"normalisation {kind} of {name!r}: got shape {values.shape}, wanted finite numbers that broadcast "
                    f"against {example}" + (", all above zero" if kind == "std" else "")
                )
            if values.size > INLINE:
                own = f"{name}_{kind}"
                if own in columns:
                    raise DataError(
                        f"got an array {own!r}, but the normalisation of {name!r} is stored under that name; rename it"
                    )
                same = values.shape == example
                beside[own] = values, _axes(name if same else own, Column(values.shape, values.dtype))
                entries[name][kind] = own
            else:
                entries[name][kind] = values.tolist()
    return entries, beside
