"""The history: the reports of a run, row by row, readable at any time while it is written.

Resizing a Zarr array under a reader breaks most of its reads. So each incarnation lays out one array, full of
NaN, and fills it from the front by whole chunks, which are written atomically. A reader keeps the rows that have
a ``step``. An array that is full is continued in another group. An array per column would cost each incarnation
more than sixty files, and each flush as many requests.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec

from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.stores import (
    Array,
    StorageOptions,
    children,
    decoding,
    has_key,
    normalise,
    open_store,
    redact,
)
from dask_isgd.storage.data.codecs import require_numeric

if TYPE_CHECKING:
    import xarray

CHUNK_ROWS = 1024
_REPORTS = "reports"


class History:
    """A writer of the rows of one incarnation; `create` makes it, and it is never shared."""

    def __init__(
        self,
        url: str | Path,
        group: str,
        columns: Sequence[str],
        rows: int,
        *,
        attrs: Mapping[str, Any] | None = None,
        chunk_rows: int = CHUNK_ROWS,
        storage_options: StorageOptions = None,
    ) -> None:
        self.url = normalise(url)
        self.group = group
        self.columns = tuple(dict.fromkeys(name for name in columns if name != "step"))
        """Names of the columns, without ``step``."""
        self.rows = rows
        self.attrs = dict(attrs or {})
        self.chunk_rows = min(chunk_rows, rows)
        self._store = open_store(self.url, read_only=False, storage_options=storage_options)
        self._part = 0
        self._row = 0
        self._block = np.full((self.chunk_rows, len(self.columns) + 1), np.nan)
        self._waiting: list[tuple[float, ...]] = []
        self._array: Array | None = None
        self._lock = threading.RLock()

    @classmethod
    def create(
        cls,
        url: str | Path,
        group: str,
        columns: Sequence[str],
        rows: int,
        *,
        attrs: Mapping[str, Any] | None = None,
        chunk_rows: int = CHUNK_ROWS,
        storage_options: StorageOptions = None,
    ) -> History:
        """Create ``group`` with room for ``rows`` rows of ``columns`` and a ``step``, all f8 and NaN.

        ``attrs`` hold ``incarnation`` and ``start_step``, the step from which this incarnation resumed.
        Raises ValueError if the group exists, StorageFullError.
        """
        if rows < 1 or chunk_rows < 1:
            raise ValueError(f"history: got rows={rows}, chunk_rows={chunk_rows}, wanted both at least 1")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", group):
            raise ValueError(f"history: got group {group!r}, wanted letters, digits, '-' and '_'")
        history = cls(url, group, columns, rows, attrs=attrs, chunk_rows=chunk_rows, storage_options=storage_options)
        with writing(redact(history.url)):
            zarr.open_group(history._store, mode="a", zarr_format=3)
            history._lay_out()
        return history

    def __repr__(self) -> str:
        return f"<History {redact(self.url)}/{self._name}: {self._row} rows written, {len(self._waiting)} waiting>"

    def append(self, row: Mapping[str, float]) -> None:
        """Keep one row in memory until `flush`: a finite ``step`` and any of the columns; the others become NaN."""
        unknown = set(row) - {*self.columns, "step"}
        if unknown:
            raise ValueError(f"history: got unknown columns {sorted(unknown)}, wanted {', '.join(self.columns)}")
        step = float(row.get("step", math.nan))
        if not math.isfinite(step):
            raise ValueError(f"history: got step {row.get('step')!r}, wanted a finite number")
        values = (*(float(row.get(name, math.nan)) for name in self.columns), step)
        self._waiting.append(values)  # without the lock, so that a caller never waits for the store during `flush`

    def flush(self) -> None:
        """Write the waiting rows by whole chunks. After StorageFullError they are still waiting."""
        with self._lock, writing(redact(self.url)):
            left = len(self._waiting)  # without later rows: if they arrive faster than they are written, this must end
            if left and not has_key(self._store, f"{self._name}/{_REPORTS}/zarr.json"):
                self._begin_again()
            while left:
                if self._row == self.rows:
                    self._part += 1
                    self._row = 0
                    self._lay_out()
                start = self._row - self._row % self.chunk_rows
                stop = min(start + self.chunk_rows, self.rows)
                taken = np.array(self._waiting[: min(left, stop - self._row)])
                end = self._row + len(taken)
                self._block[self._row - start : end - start] = taken
                self._write(start, stop)
                del self._waiting[: len(taken)]
                left -= len(taken)
                self._row = end
                if end == stop:
                    self._block[:] = np.nan

    def _write(self, start: int, stop: int) -> None:
        assert self._array is not None
        self._array[start:stop] = self._block[: stop - start]

    def _begin_again(self) -> None:
        """Lay out a group that somebody has deleted, with the rows of the chunk that was being filled."""
        zarr.open_group(self._store, mode="a", zarr_format=3)
        self._lay_out(overwrite=True)
        self._row = self._row % self.chunk_rows if self._row < self.rows else 0

    @property
    def _name(self) -> str:
        return f"{self.group}.{self._part}" if self._part else self.group

    def _lay_out(self, *, overwrite: bool = False) -> None:
        try:
            group = zarr.create_group(
                self._store, path=self._name, attributes=self.attrs, zarr_format=3, overwrite=overwrite
            )
        except zarr.errors.ContainsGroupError:
            raise ValueError(
                f"history: group {self._name!r} exists in {redact(self.url)}; each incarnation needs a group of its own"
            ) from None

        width = len(self.columns) + 1
        self._array = group.create_array(
            _REPORTS,
            shape=(self.rows, width),
            chunks=(self.chunk_rows, width),
            dtype="f8",
            fill_value=math.nan,
            compressors=[Crc32cCodec()],
            filters=None,
            dimension_names=("report", "column"),
            attributes={"columns": [*self.columns, "step"]},
        )


def read_history(url: str | Path, prefix: str = "learner", *, storage_options: StorageOptions = None) -> xarray.Dataset:
    """Return what ``read_columns`` does, with dimension ``report`` and coordinates ``step`` and ``incarnation``."""
    import xarray  # importing takes half a second, which most readers save

    columns = read_columns(url, prefix, storage_options=storage_options)
    variables = {name: ("report", values) for name, values in columns.items()}
    coordinates = {name: variables.pop(name) for name in ("step", "incarnation")}
    return xarray.Dataset(variables, coords=coordinates)


def read_columns(
    url: str | Path, prefix: str = "learner", *, storage_options: StorageOptions = None
) -> dict[str, np.ndarray]:
    """Return the reports of all incarnations by column, each (reports,) f8; ``incarnation`` i8.

    This may run while writers write. If an incarnation resumed from ``start_step``, the rows of older ones
    beyond it are dropped, so that each step occurs once, in order. Before the first report there are only ``step`` and
    ``incarnation``, both empty. Raises CorruptChunkError.
    """
    incarnations: dict[int, list[dict[str, np.ndarray]]] = {}
    starts: dict[int, float] = {}
    store = open_store(url, read_only=True, storage_options=storage_options)
    for name in _parts(store, prefix):
        with decoding(f"history {redact(url)}, group {name!r}"):
            attributes, found = _read_group(store, name)
            incarnation, start = int(attributes.get("incarnation", 0)), float(attributes.get("start_step", 0))
            np.int64(incarnation)  # OverflowError
        if found is not None:
            incarnations.setdefault(incarnation, []).append(found)
            starts[incarnation] = start
    kept = list(_consistent(incarnations, starts))
    names = dict.fromkeys(name for part in kept for name in part if name not in ("step", "incarnation"))

    def whole(name: str) -> np.ndarray:
        parts = [part[name] if name in part else np.full(len(part["step"]), np.nan) for part in kept]
        return np.concatenate(parts) if parts else np.empty(0)

    return {
        **{name: whole(name) for name in names},
        "step": whole("step"),
        "incarnation": whole("incarnation").astype(np.int64),
    }


def _parts(store: Store, prefix: str) -> list[str]:
    """Return the names of the groups of one kind of writer, each followed by its continuations."""

    def order(name: str) -> tuple[str, int]:
        base, _, part = name.partition(".")
        return base, int(part or 0)

    pattern = re.compile(rf"{re.escape(prefix)}(-[A-Za-z0-9_-]+)?(\.\d+)?")
    return sorted((name for name in children(store) if pattern.fullmatch(name)), key=order)


def _read_group(store: Store, name: str) -> tuple[Mapping[str, Any], dict[str, np.ndarray] | None]:
    """Return attributes and completed rows of one group; None for the rows while the group is being created."""
    try:
        group = zarr.open_group(store, path=name, mode="r", zarr_format=3)
        array = zarr.open_array(store, path=f"{name}/{_REPORTS}", mode="r", zarr_format=3)
    except FileNotFoundError:
        return {}, None
    require_numeric(array, name)
    columns = [str(column) for column in array.attrs["columns"]]  # type: ignore[union-attr]
    if columns[-1] != "step" or array.shape[1:] != (len(columns),):
        raise ValueError(f"got {array.shape} numbers for the columns {columns}, wanted a step in the last of them")
    rows = _front(array)
    return group.attrs.asdict(), {column: rows[:, i] for i, column in enumerate(columns)}


def _front(array: Array) -> np.ndarray:
    """Return the rows that have a step; the array is filled from the front, and no further chunk is read."""
    parts: list[np.ndarray] = [np.empty((0, array.shape[1]))]
    for start in range(0, array.shape[0], array.chunks[0]):
        part = np.asarray(array[start : start + array.chunks[0]], np.float64)
        parts.append(part[np.isfinite(part[:, -1])])
        if len(parts[-1]) < len(part):
            break
    return np.concatenate(parts)


def _consistent(
    incarnations: Mapping[int, list[dict[str, np.ndarray]]], starts: Mapping[int, float]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of each incarnation up to where a later one resumed, and beyond the rows kept of earlier ones."""
    last = -math.inf
    for incarnation in sorted(incarnations):
        most = min((starts[other] for other in incarnations if other > incarnation), default=math.inf)
        least = last
        for part in incarnations[incarnation]:
            keep = (part["step"] > least) & (part["step"] <= most)
            if not keep.any():
                continue
            last = max(last, float(part["step"][keep].max()))
            yield {
                **{name: values[keep] for name, values in part.items()},
                "incarnation": np.full(int(keep.sum()), incarnation),
            }
