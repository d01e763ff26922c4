"""One pass over a table: the categories of its columns, and what its missing values are replaced by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.pipelines.ingestion.missing import Fill
from dask_isgd.storage.tables.table import Table, is_missing

_BLOCK_ROWS = 1 << 16


@dataclass
class _Column:
    """What has been seen of one column."""

    categories: set[Any] | None
    """Distinct values; None if they are not counted."""
    rule: str | float | None
    missing: int = 0
    first: int | None = None
    """The first row with a missing value."""
    count: Any = 0
    total: Any = 0.0
    values: list[NDArray[Any]] = field(default_factory=list)


def survey(
    table: Table,
    rules: Mapping[str, str | float | None],
    coded: frozenset[str],
    measured: NDArray[np.bool_],
) -> tuple[dict[str, tuple[Any, ...]], dict[str, Fill]]:
    """Return the categories of the columns ``coded``, sorted, and the fills of the columns that need one.

    ``rules`` has for each column how it is filled, or None. Means and medians are taken over the rows ``measured``
    (N,), those of the training split. Raises DataError for a missing value without a rule in a coded column.
    """
    found = {name: _Column(set() if name in coded else None, rule) for name, rule in rules.items()}
    for start, stop in table.blocks(_BLOCK_ROWS) if found else ():
        for name, values in table.read(start, stop, list(found)).items():
            _observe(found[name], values, measured[start:stop], start)
    categories, fills = {}, {}
    for name, column in found.items():
        fill = _fill(name, column)
        if fill is not None:
            fills[name] = fill
        if column.categories is not None:
            known = column.categories | ({fill.value} if fill is not None else set())
            if fill is None and column.missing:
                raise DataError(
                    f"column {name!r}: got a missing value in row {column.first}, wanted a category; pass "
                    f"missing={{{name!r}: 'unknown'}} or missing='drop'"
                )
            try:
                categories[name] = tuple(sorted(known))
            except TypeError as error:
                raise DataError(f"column {name!r}: got categories of several types ({error}), wanted one") from error
    return categories, fills


def _observe(column: _Column, values: NDArray[Any], measured: NDArray[np.bool_], start: int) -> None:
    missing = is_missing(values)
    rows = missing.reshape(len(values), -1).any(axis=1)
    if rows.any():
        column.missing += int(rows.sum())
        column.first = column.first if column.first is not None else start + int(rows.argmax())
    if column.categories is not None:
        column.categories.update(values[~missing].tolist())
    elif column.rule == "mean":
        known = np.where(missing[measured], 0.0, values[measured])
        column.total = column.total + known.sum(axis=0, dtype=np.float64)
        column.count = column.count + (~missing[measured]).sum(axis=0)
    elif column.rule == "median":
        column.values.append(values[measured & ~rows])


def _fill(name: str, column: _Column) -> Fill | None:
    """Return what replaces the missing values of a column; None if it has none or no rule."""
    rule = column.rule
    if rule is None or not column.missing:
        return None
    if column.categories is not None:
        kinds = {type(value) for value in column.categories} or {type(rule)}
        if rule in ("mean", "median") or type(rule) not in kinds:
            raise DataError(
                f"column {name!r}: got the fill {rule!r} for categories, wanted one of them or another such value; "
                f"pass missing={{{name!r}: 'unknown', …}}"
            )
        return Fill(rule, column.missing)
    if isinstance(rule, str) and rule not in ("mean", "median"):
        raise DataError(f"column {name!r}: got the fill {rule!r} for numbers, wanted 'mean', 'median' or a number")
    if rule == "mean":
        if not np.all(column.count):
            raise DataError(f"column {name!r}: got no values in the training split, wanted some for a mean")
        mean = column.total / column.count
        return Fill(float(mean) if np.ndim(mean) == 0 else mean, column.missing)
    if rule == "median":
        known = np.concatenate(column.values)
        if known.ndim != 1 or not len(known):
            raise DataError(f"column {name!r}: got rows of shape {known.shape[1:]}, wanted numbers for a median")
        return Fill(float(np.median(known)), column.missing)
    return Fill(float(rule), column.missing)
