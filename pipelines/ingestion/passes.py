"""The two passes of a shuffle that never holds more than a block of rows.

::

    source        scattered                      dataset
    block 0  ──▶  rows of block 0, sorted  ─┐ ┌▶ bucket 0: whole chunks of one split
    block 1  ──▶  by where they go         ─┼─┼▶ bucket 1
    ...                                     ┘ └▶ ...

The first pass reads each block once and writes its rows to a folder of its own, in the order of their
destinations. The second collects for each bucket, a run of whole chunks, its piece of every block. Each
block and each bucket has one writer and is either finished or not there, so that any of them may run
anywhere, twice, or again after a crash.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LabelError
from dask_isgd.pipelines.ingestion.statistics import Moments
from dask_isgd.pipelines.ingestion.tables import Table
from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.local import temporary
from dask_isgd.storage.data.writing import Column

_WRITE_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class ShufflePlan:
    """All that a block or a bucket needs to know. Pickles."""

    table: Table
    work: Path
    """Folder of what is under way; every worker sees it."""
    columns: Mapping[str, Column]
    """What is written, with the dtypes it is written in."""
    inputs: tuple[str, ...]
    target: str
    names: tuple[Any, ...] | None
    """Values of the target in the order of their class numbers; None: they are numbers already."""
    classify: bool
    missing: str
    blocks: tuple[tuple[int, int], ...]
    """Rows of the source, a block each."""
    buckets: tuple[tuple[str, int, int, int], ...]
    """Split, the split's first destination, and first and last destination (excluded) of each bucket."""

    @property
    def data(self) -> Path:
        return self.work / "data.zarr"

    def block(self, i: int) -> Path:
        return self.work / "blocks" / f"{i:06d}"

    def bucket(self, i: int) -> Path:
        return self.work / "buckets" / f"{i:06d}.npz"


def scatter(plan: ShufflePlan, i: int) -> int:
    """Write block ``i``, checked and cast, in the order of its destinations; returns ``i``.

    Raises DataError for a value that a cast would change, or that is missing; LabelError.
    """
    folder = plan.block(i)
    if folder.is_dir():
        return i
    start, stop = plan.blocks[i]
    rows = plan.table.read(start, stop, list(plan.columns))
    target = np.load(plan.work / "destinations.npy", mmap_mode="r")[start:stop]
    order = np.argsort(target, kind="stable")
    partial = temporary(folder)
    with writing(folder):
        partial.mkdir(parents=True)
        np.save(partial / "destinations.npy", target[order])
        for name, column in plan.columns.items():
            values = _checked(plan, name, rows.pop(name), start)
            with (partial / name).open("wb") as file:
                for first in range(0, len(order), _WRITE_ROWS):  # a sorted copy of it all would be a second block
                    part = values[order[first : first + _WRITE_ROWS]]
                    part.astype(column.dtype, copy=False).tofile(file)
            del values
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not folder.is_dir():
                raise
    return i


def collect(plan: ShufflePlan, i: int) -> int:
    """Write the chunks of bucket ``i``, and its statistics beside; returns ``i``."""
    mark = plan.bucket(i)
    if mark.is_file():
        return i
    split, origin, start, stop = plan.buckets[i]
    pieces = []
    for block in range(len(plan.blocks)):
        target = np.load(plan.block(block) / "destinations.npy", mmap_mode="r")
        first, last = (int(edge) for edge in np.searchsorted(target, [start, stop]))
        if first < last:
            pieces.append((block, first, np.asarray(target[first:last]) - start))
    found: dict[str, Any] = {"split": np.array(split)}
    with writing(plan.data):
        for name, column in plan.columns.items():
            rows = np.empty((stop - start, *column.shape), column.dtype)
            row_bytes = max(1, rows[:1].nbytes)
            for block, first, places in pieces:
                with (plan.block(block) / name).open("rb") as file:
                    file.seek(first * row_bytes)
                    for begin in range(0, len(places), _WRITE_ROWS):
                        part = places[begin : begin + _WRITE_ROWS]
                        read = np.fromfile(file, column.dtype, len(part) * rows[0].size)
                        rows[part] = read.reshape(len(part), *column.shape)
            # An all-zero chunk must be there; what an array was created with does not say so.
            array: Any = zarr.open_array(str(plan.data), path=f"{split}/{name}", mode="r+")
            array = array.with_config({"write_empty_chunks": True})
            total: Moments | None = None
            step = array.chunks[0]
            for begin in range(0, stop - start, step):
                chunk = rows[begin : begin + step]
                array[start - origin + begin : start - origin + begin + len(chunk)] = chunk
                if name in plan.inputs:
                    moments = Moments.of(chunk)
                    total = moments if total is None else total + moments
            if total is not None:
                found |= {f"{name}/count": total.count, f"{name}/mean": total.mean, f"{name}/spread": total.spread}
            if name == plan.target and plan.classify:
                found["counts"] = np.bincount(rows.reshape(-1).astype(np.int64))
    mark.parent.mkdir(exist_ok=True)
    partial = temporary(mark)
    with writing(mark), partial.open("wb") as file:
        np.savez(file, **found)
    partial.replace(mark)
    return i


def _checked(plan: ShufflePlan, name: str, values: NDArray[Any], start: int) -> NDArray[Any]:
    """Values of a block that its cast keeps, with classes as numbers; ``start`` is its first row."""
    if name == plan.target and plan.names is not None:
        codes = np.searchsorted(np.array(plan.names), values)
        return codes.astype(np.int64)
    wanted = plan.columns[name].dtype
    if values.dtype.kind == "f" and plan.missing == "refuse":
        _refuse(
            ~np.isfinite(values),
            name,
            start,
            "values that are missing or infinite",
            "drop or fill them first, or pass missing='keep'",
        )
    if name == plan.target and plan.classify:
        bad = values < 0
        if bad.any():
            raise LabelError(
                f"target {name!r}: got a label of {values[bad].min()} at row {start + _first(bad)}, wanted 0 or more; "
                "pass relabel=True to number them anew, or classify=False where they are no classes"
            )
    if values.dtype == wanted:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(wanted)
    if wanted.kind == "f":
        lost = (
            np.isfinite(values) & ~np.isfinite(cast)
            if values.dtype.kind == "f"
            else cast.astype(values.dtype) != values
        )
    else:
        lost = cast.astype(values.dtype) != values
    _refuse(lost, name, start, f"a {values.dtype} that {wanted} cannot hold", "choose another dtype (dtypes=...)")
    return cast


def _refuse(bad: NDArray[np.bool_], name: str, start: int, what: str, advice: str) -> None:
    if bad.any():
        raise DataError(f"array {name!r}: got {what}, first in row {start + _first(bad)}; {advice}")


def _first(bad: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
