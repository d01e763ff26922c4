"""The plan of a shuffle: where each row goes, and the pieces of work that bring it there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from dask.utils import format_bytes
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.pipelines.ingestion.columns import Columns, row_bytes
from dask_isgd.pipelines.ingestion.splits import by_fraction, by_group, by_rows, by_time, destinations
from dask_isgd.storage.backends.folder import writing
from dask_isgd.storage.backends.local import temporary
from dask_isgd.storage.tables.table import Table, scalars

_COPIES = 4
"""Copies of a block in memory at a time."""
_CHUNK_COPIES = 2
"""Copies of a chunk in memory while it is written, which Zarr does whole."""
_NUMBERS_BYTES = 3 * 8 + 1
"""Bytes per row of the order of all rows, their destinations and their splits."""


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How rows are assigned to splits, and ordered inside each."""

    splits: Mapping[str, Any]
    """By name: fractions, moments, or arrays of row numbers; see `ingest`."""
    group: str | None
    time: str | None
    shuffle: bool
    seed: int

    def __post_init__(self) -> None:
        if not self.splits:
            raise DataError("splits: got none, wanted at least one, such as {'train': 1.0}")
        if (self.group is not None) + (self.time is not None) + self.lists_rows > 1:
            raise DataError("splits: got more than one of group, time and rows; wanted one of these at most")

    @property
    def lists_rows(self) -> bool:
        return any(isinstance(value, np.ndarray) for value in self.splits.values())

    @property
    def column(self) -> str | None:
        """The column that decides, if any."""
        return self.group if self.group is not None else self.time

    def measured(self, table: Table) -> NDArray[np.bool_]:
        """Return which rows statistics are taken over, (N,): those of ``train``, or of the first split."""
        split, _ = self.assign(table)
        return np.asarray(split == list(self.splits).index(measured_split(self.splits)))

    def assign(self, table: Table) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
        """Return the split of each row, (N,), and an order of all rows in which each split is written."""
        if self.lists_rows:
            return by_rows(table.length, self.splits)
        generator = np.random.default_rng(self.seed)
        order = generator.permutation(table.length) if self.shuffle else np.arange(table.length)
        if self.group is not None:
            return by_group(scalars(table, self.group), self.splits, generator), order
        if self.time is not None:
            return by_time(scalars(table, self.time), self.splits), order
        return by_fraction(order, self.splits), order


def measured_split(splits: Iterable[str]) -> str:
    """Return the name of the split that statistics are taken over: ``train``, or the first one."""
    names = list(splits)
    return "train" if "train" in names else names[0]


@dataclass(frozen=True, kw_only=True)
class ShufflePlan:
    """All that the work on one block or bucket needs to know. It can be pickled."""

    table: Table
    work: Path
    """Folder of the unfinished dataset; every worker must see it."""
    columns: Columns
    keep_missing: bool
    """Whether values that are missing or infinite are kept; otherwise they are refused."""
    chunk_size: int
    blocks: tuple[tuple[int, int], ...]
    """Spans of the source's rows."""
    buckets: tuple[tuple[str, int, int, int], ...]
    """Of each bucket: its split, the split's first destination, the bucket's first and last destination (excluded)."""

    @property
    def data(self) -> Path:
        return self.work / "data.zarr"

    @property
    def destinations(self) -> Path:
        """File with the place of each row among all splits laid end to end, (N,)."""
        return self.work / "destinations.npy"

    def block(self, i: int) -> Path:
        return self.work / "blocks" / f"{i:06d}"

    def bucket(self, i: int) -> Path:
        return self.work / "buckets" / f"{i:06d}.npz"

    @property
    def lengths(self) -> dict[str, int]:
        """Rows of each split."""
        lengths: dict[str, int] = {}
        for split, _, start, stop in self.buckets:
            lengths[split] = lengths.get(split, 0) + stop - start
        return lengths


def require_countable(table: Table) -> None:
    """Refuse a table, before anything of its length is allocated, whose row numbers exceed the free memory."""
    numbers, free = table.length * _NUMBERS_BYTES, psutil.virtual_memory().available
    if numbers > free:
        raise DataError(
            f"source: got {table.length:,} rows, whose numbers take {format_bytes(numbers)} of memory, and "
            f"{format_bytes(free)} are free; is the array's shape right?"
        )


def require_room(table: Table, columns: Columns, memory: int, chunk: int) -> None:
    """Refuse, before a row is read, rows of which too few fit into ``memory`` bytes, and chunks that cannot be held."""
    row = max(columns.row_bytes, row_bytes(table.columns[name] for name in columns.written))
    if row * _COPIES > memory:
        raise DataError(
            f"source: got rows of {format_bytes(row)}, of which {_COPIES} must fit into {format_bytes(memory)}; "
            "pass more memory=…, or use smaller rows"
        )
    whole, free = chunk * columns.row_bytes, psutil.virtual_memory().available
    if whole * _CHUNK_COPIES > free:
        raise DataError(
            f"chunk_size: got {chunk:,} rows, {format_bytes(whole)} a chunk, of which {_CHUNK_COPIES} must fit into "
            f"{format_bytes(free)} of free memory; wanted a smaller chunk_size"
        )


def make_plan(
    table: Table, columns: Columns, rule: SplitRule, work: Path, *, chunk_size: int, keep_missing: bool, memory: int
) -> ShufflePlan:
    """Return the plan, with the rows' destinations in a file of the folder ``work``. ``memory`` is in bytes."""
    split, order = rule.assign(table)
    target, ranges = destinations(split, list(rule.splits), order)
    rows = memory // max(columns.row_bytes, row_bytes(table.columns[name] for name in columns.written))
    size = chunk_size * max(1, rows // 2 // chunk_size)
    plan = ShufflePlan(
        table=table,
        work=work,
        columns=columns,
        keep_missing=keep_missing,
        chunk_size=chunk_size,
        # Reading may copy the block once; its cast and the check of the cast take two more copies.
        blocks=tuple(table.blocks(max(1, rows // _COPIES))),
        buckets=tuple(
            (name, first, start, min(start + size, last))
            for name, (first, last) in ranges.items()
            for start in range(first, last, size)
        ),
    )
    work.mkdir(parents=True, exist_ok=True)
    partial = temporary(plan.destinations)
    with writing(work), partial.open("wb") as file:
        np.save(file, target)
    os.replace(partial, plan.destinations)
    return plan
