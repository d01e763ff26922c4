"""The two passes of a shuffle that never holds more than one block of rows in memory.

::

    source        scattered                      dataset
    block 0  ──▶  rows of block 0, sorted  ─┐ ┌▶ bucket 0: whole chunks of one split
    block 1  ──▶  by destination           ─┼─┼▶ bucket 1
    ...                                     ┘ └▶ ...

The first pass reads each block once and writes its rows, in the order of their destinations, to a folder of their
own. The second pass collects, for each bucket (a run of whole chunks), its piece of every block. Each block and
each bucket has one writer and is either finished or absent, so that any of them may run on any worker, twice, or
again after a crash.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.pipelines.ingestion.casting import cast
from dask_isgd.pipelines.ingestion.plan import ShufflePlan
from dask_isgd.pipelines.ingestion.statistics import Moments
from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.local import temporary
from dask_isgd.storage.tables.table import is_missing

if TYPE_CHECKING:
    from distributed import Client

_WRITE_ROWS = 1024


def run_pass(task: Callable[[ShufflePlan, int], int], plan: ShufflePlan, count: int, client: Client | None) -> None:
    """Run ``task`` for all items of a pass, here or on the client's cluster; the first failure ends the pass."""
    if client is None:
        for i in range(count):
            task(plan, i)
        return
    from distributed import as_completed

    shared = client.scatter(plan, broadcast=True)
    futures = client.map(task, [shared] * count, range(count), pure=False)
    try:
        for future in as_completed(futures):
            future.result()
    finally:
        client.cancel(futures)


def scatter(plan: ShufflePlan, i: int) -> int:
    """Write block ``i``, checked and cast, in the order of its destinations; return ``i``.

    Raises DataError for a value that is missing or that a cast would change; LabelError.
    """
    folder = plan.block(i)
    if folder.is_dir():
        return i
    start, stop = plan.blocks[i]
    rows = plan.table.read(start, stop, list(plan.columns.written))
    target = np.load(plan.destinations, mmap_mode="r")[start:stop]
    order = np.argsort(target, kind="stable")
    partial = temporary(folder)
    with writing(folder):
        partial.mkdir(parents=True)
        np.save(partial / "destinations.npy", target[order])
        for name in plan.columns.written:
            values = _cast(plan, name, rows.pop(name), start)
            with (partial / name).open("wb") as file:
                for first in range(0, len(order), _WRITE_ROWS):  # sorting all rows at once would copy the block
                    values[order[first : first + _WRITE_ROWS]].tofile(file)
            del values
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not folder.is_dir():
                raise
    return i


def collect(plan: ShufflePlan, i: int) -> int:
    """Write the chunks of bucket ``i``, and its statistics to a file; return ``i``."""
    mark = plan.bucket(i)
    if mark.is_file():
        return i
    split, origin, start, stop = plan.buckets[i]
    pieces = _pieces(plan, start, stop)
    found: dict[str, Any] = {"split": np.array(split)}
    with writing(plan.data):
        for name in plan.columns.written:
            rows = _gather(plan, name, pieces, stop - start)
            moments = _write_chunks(plan, f"{split}/{name}", rows, start - origin, name in plan.columns.inputs)
            if moments is not None:
                found |= {f"{name}/count": moments.count, f"{name}/mean": moments.mean}
                found[f"{name}/spread"] = moments.spread
            if name == plan.columns.target and plan.columns.classify:
                found["counts"] = np.bincount(rows.reshape(-1).astype(np.int64))
    mark.parent.mkdir(exist_ok=True)
    partial = temporary(mark)
    with writing(mark), partial.open("wb") as file:
        np.savez(file, **found)
    partial.replace(mark)
    return i


def _cast(plan: ShufflePlan, name: str, values: NDArray[Any], start: int) -> NDArray[Any]:
    """Return the values of a block as they are written, classes as numbers; ``start`` is the block's first row."""
    target = name == plan.columns.target
    if target and plan.columns.class_values is not None:
        missing = is_missing(values)
        if missing.any():
            raise DataError(
                f"target {name!r}: got no value in row {start + int(missing.argmax())}, wanted a class; pass "
                "missing='drop' to leave such rows out"
            )
        return np.searchsorted(np.array(plan.columns.class_values), values).astype(np.int64)
    return cast(
        values,
        plan.columns.written[name].dtype,
        name=name,
        first_row=start,
        allow_missing=plan.keep_missing,
        classes=target and plan.columns.classify,
    )


def _pieces(plan: ShufflePlan, start: int, stop: int) -> list[tuple[int, int, NDArray[np.int64]]]:
    """Return, for each block that has rows of a bucket: its number, the first such row, their places in the bucket."""
    pieces = []
    for block in range(len(plan.blocks)):
        target = np.load(plan.block(block) / "destinations.npy", mmap_mode="r")
        first, last = (int(edge) for edge in np.searchsorted(target, [start, stop]))
        if first < last:
            pieces.append((block, first, np.asarray(target[first:last]) - start))
    return pieces


def _gather(
    plan: ShufflePlan, name: str, pieces: list[tuple[int, int, NDArray[np.int64]]], length: int
) -> NDArray[Any]:
    """Return the rows of a bucket, (length, ...), read from its pieces."""
    column = plan.columns.written[name]
    rows = np.empty((length, *column.shape), column.dtype)
    row_bytes = max(1, rows[:1].nbytes)
    for block, first, places in pieces:
        with (plan.block(block) / name).open("rb") as file:
            file.seek(first * row_bytes)
            for begin in range(0, len(places), _WRITE_ROWS):
                part = places[begin : begin + _WRITE_ROWS]
                read = np.fromfile(file, column.dtype, len(part) * rows[0].size)
                rows[part] = read.reshape(len(part), *column.shape)
    return rows


def _write_chunks(plan: ShufflePlan, path: str, rows: NDArray[Any], first: int, measure: bool) -> Moments | None:
    """Write rows to whole chunks of an array, from row ``first`` on; return their moments if ``measure``."""
    # All-zero chunks must be written too; an array that is opened again does not remember that.
    with zarr.config.set({"array.write_empty_chunks": True}):
        array: Any = zarr.open_array(str(plan.data), path=path, mode="r+")
    total: Moments | None = None
    for begin in range(0, len(rows), array.chunks[0]):
        chunk = rows[begin : begin + array.chunks[0]]
        array[first + begin : first + begin + len(chunk)] = chunk
        if measure:
            moments = Moments.of(chunk)
            total = moments if total is None else total + moments
    return total
