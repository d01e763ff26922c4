"""Rules for missing values: NaN, None and ``pandas.NA``."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.field_types import is_number
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.table import Table, is_missing

logger = logging.getLogger(__name__)

ROW_RULES, FILL_RULES = ("refuse", "keep", "drop"), ("mean", "median")
_BLOCK_ROWS = 1 << 16
MissingRule: TypeAlias = str | float | Mapping[str, str | float]


@dataclass(frozen=True)
class Fill:
    """What replaced the missing values of a column."""

    value: Any
    """A number, a string, or an array (...) with a number for each of a row."""
    count: int
    """Rows with a missing value."""


def check_rule(missing: Any) -> None:
    """Raise DataError unless ``missing`` is a rule: a name, a number, or a mapping of columns to fills."""
    fills = missing.values() if isinstance(missing, Mapping) else (missing,)
    named = () if isinstance(missing, Mapping) else (*ROW_RULES, *FILL_RULES)
    if not all(is_number(fill) or (isinstance(fill, str) and (not named or fill in named)) for fill in fills):
        raise DataError(
            f"missing: got {missing!r}, wanted 'refuse', 'keep', 'drop', 'mean', 'median', a number, or a mapping of "
            "columns to 'mean', 'median', a number or a string"
        )


def fill_rule(missing: MissingRule, column: str) -> str | float | None:
    """Return how the missing values of a column are filled; None if they are not."""
    if isinstance(missing, Mapping):
        return missing.get(column)
    return None if missing in ROW_RULES else missing


class CompleteRows:
    """The rows of a table that have a value in each of some columns, in their order."""

    def __init__(self, table: Table, needed: Sequence[str]) -> None:
        self._table, self.class_names = table, table.class_names
        self.columns: Mapping[str, Column] = table.columns
        found: list[NDArray[np.int64]] = []
        counts = dict.fromkeys(needed, 0)
        for start, stop in table.blocks(_BLOCK_ROWS):
            bad = np.zeros(stop - start, bool)
            for name, values in table.read(start, stop, needed).items():
                missing = is_missing(values).reshape(stop - start, -1).any(axis=1)
                counts[name] += int(missing.sum())
                bad |= missing
            found.append(np.flatnonzero(~bad) + start)
        self._rows = np.concatenate(found) if found else np.zeros(0, np.int64)
        self.length = len(self._rows)
        left_out = table.length - self.length
        if not self.length:
            raise EmptyDatasetError(f"missing: every one of {table.length} rows lacks a value, wanted complete rows")
        if left_out:
            where = ", ".join(f"{name!r}: {count:,}" for name, count in counts.items() if count)
            logger.warning("ingest: %s of %s rows lack a value and are left out (%s)",
                           f"{left_out:,}", f"{table.length:,}", where)  # fmt: skip

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        rows = self._rows[start:stop]
        if not len(rows):
            return self._table.read(0, 0, names)
        first = int(rows[0])
        found = self._table.read(first, int(rows[-1]) + 1, names)
        return {name: values[rows - first] for name, values in found.items()}

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        edges = [0]
        for _, stop in self._table.blocks(rows):
            edges.append(int(np.searchsorted(self._rows, stop)))
        return [(a, b) for a, b in itertools.pairwise(edges) if a < b]
