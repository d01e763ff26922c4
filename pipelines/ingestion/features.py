"""Columns made ready for a model: missing values filled, strings coded, columns stacked side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.pipelines.ingestion.missing import Fill
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.table import Table, is_missing


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How columns are made ready."""

    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By the name of each new array: the columns that it consists of."""
    categories: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """By column, its categories: one-hot coded in a stack, otherwise coded as the index of the category."""
    fills: Mapping[str, Fill] = field(default_factory=dict)
    masks: frozenset[str] = frozenset()
    """Columns beside which their stack has an entry that is 1 if the value was missing."""

    def entries(self, stack: str) -> list[str]:
        """Return what each number of a stacked row is: ``age``, ``colour=red``, ``age is missing``."""
        names = []
        for column in self.stacks[stack]:
            categories = self.categories.get(column)
            names += [column] if categories is None else [f"{column}={value}" for value in categories]
            names += [f"{column} is missing"] if column in self.masks else []
        return names

    def indicators(self, stack: str) -> NDArray[np.bool_]:
        """Return (F,) which numbers of a stacked row are 0 or 1, and are not normalised."""
        found = []
        for column in self.stacks[stack]:
            found += [True] * len(self.categories[column]) if column in self.categories else [False]
            found += [True] if column in self.masks else []
        return np.array(found)

    @property
    def changes(self) -> bool:
        """Whether any column differs from the source's."""
        return bool(self.stacks or self.categories or self.fills)

    def attributes(self) -> dict[str, Any]:
        """Return what a dataset records, as plain JSON: names of the numbers, categories, what was filled."""
        return {
            "features": {name: self.entries(name) for name in self.stacks},
            "categories": {name: list(values) for name, values in self.categories.items()},
            "filled": {
                name: {"value": fill.value.tolist() if isinstance(fill.value, np.ndarray) else fill.value,
                       "rows": fill.count}
                for name, fill in self.fills.items()
            },
        }  # fmt: skip


class CodedTable:
    """A table with the columns that a `Coding` makes of the columns of another one."""

    def __init__(self, table: Table, coding: Coding) -> None:
        self._table, self._coding, self.length, self.class_names = table, coding, table.length, table.class_names
        columns = {name: column for name, column in table.columns.items() if name not in coding.stacks}
        columns.update((name, Column((), np.dtype("i8"))) for name in coding.categories)
        for name in coding.stacks:
            columns[name] = Column((len(coding.entries(name)),), np.dtype("f8"))
        self.columns: Mapping[str, Column] = columns

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        stacks = self._coding.stacks
        needed = dict.fromkeys(column for name in names for column in stacks.get(name, (name,)))
        found = self._table.read(start, stop, list(needed))
        return {n: self._stack(n, found, start) if n in stacks else self._value(n, found[n], start) for n in names}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return self._table.blocks(rows)

    def _stack(self, name: str, found: Mapping[str, NDArray[Any]], start: int) -> NDArray[np.float64]:
        coding, length = self._coding, len(next(iter(found.values())))
        rows = np.zeros((length, *self.columns[name].shape))
        at = 0
        for column in coding.stacks[name]:
            values = self._value(column, found[column], start)
            if column in coding.categories:
                rows[np.arange(length), at + values] = 1.0
                at += len(coding.categories[column])
            else:
                rows[:, at] = values
                at += 1
            if column in coding.masks:
                rows[:, at] = is_missing(found[column])
                at += 1
        return rows

    def _value(self, column: str, values: NDArray[Any], start: int) -> NDArray[Any]:
        """Return a column with its missing values filled, and coded if it has categories."""
        fill = self._coding.fills.get(column)
        if fill is not None:
            missing = is_missing(values)
            if missing.any():
                values = np.where(missing, np.asarray(fill.value, None if values.dtype.kind != "O" else object), values)
        categories = self._coding.categories.get(column)
        return values if categories is None else _indices(column, values, categories, start)


def _indices(column: str, values: NDArray[Any], categories: Sequence[Any], start: int) -> NDArray[np.int64]:
    """Return the index of each value's category, (n,); ``start`` is the first row, for errors."""
    known = {value: index for index, value in enumerate(categories)}
    found = np.array([known.get(value, -1) for value in values.tolist()], np.int64)
    if len(found) and found.min() < 0:
        row = int(found.argmin())
        raise DataError(f"column {column!r}: got {values[row]!r} in row {start + row}, wanted one of its categories")
    return found
