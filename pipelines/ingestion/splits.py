"""Which row belongs to which split, and the order of rows in each. Pure: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, EmptyDatasetError

Integers = NDArray[np.int64]


def by_fraction(order: Integers, splits: Mapping[str, float]) -> NDArray[np.int8]:
    """Return the split of each row, (N,): consecutive parts of ``order``, a permutation of the rows.

    The first split also gets the rows that rounding leaves over.
    """
    return _consecutive(order, _counts(len(order), splits))


def by_group(groups: NDArray[Any], splits: Mapping[str, float], generator: np.random.Generator) -> NDArray[np.int8]:
    """Return the split of each row, (N,), with all rows of a group in one split.

    Groups are assigned in random order, each to the split that still lacks the most rows.
    """
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    lacking = np.array(_counts(len(groups), splits), float)
    of_group = np.empty(len(names), np.int8)
    for group in generator.permutation(len(names)):
        of_group[group] = chosen = int(np.argmax(lacking))
        lacking[chosen] -= sizes[group]
    return of_group[inverse.reshape(-1)]


def by_time(times: NDArray[Any], splits: Mapping[str, Any]) -> NDArray[np.int8]:
    """Return the split of each row, (N,), in order of time: earlier rows belong to the split that is named earlier.

    Values are fractions or, for each split but the last, the moment before which it ends: ``"2020-01-01"``.
    Rows of the same moment stay together.
    """
    if np.isnat(times).any() if times.dtype.kind in "mM" else np.isnan(times.astype(float)).any():
        raise DataError("time: got missing moments, wanted one for every row")
    values = list(splits.values())
    if all(isinstance(value, (int, float)) for value in values):
        ends = np.cumsum(_counts(len(times), splits))[:-1]
        edges = np.sort(times)[np.minimum(ends, len(times) - 1)]
    else:
        edges = np.array([np.asarray(str(value)).astype(times.dtype) for value in values[:-1]], times.dtype)
        if (edges[1:] <= edges[:-1]).any():
            raise DataError(f"splits: got the moments {[str(e) for e in edges]}, wanted them in order")
    return np.searchsorted(edges, times, side="right").astype(np.int8)


def by_rows(length: int, splits: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.int8], Integers]:
    """Return the split of each row, (N,), and the order of all rows: those that ``splits`` lists, in that order.

    Raises DataError unless every row of ``length`` is listed exactly once.
    """
    rows = [np.asarray(values) for values in splits.values()]
    order = np.concatenate(rows) if all(values.ndim == 1 and values.dtype.kind in "iu" for values in rows) else None
    if order is None or not np.array_equal(np.sort(order), np.arange(length)):
        raise DataError(f"splits: got rows for {', '.join(map(repr, splits))}, wanted each of {length} rows once")
    return _consecutive(order.astype(np.int64), [len(values) for values in rows]), order.astype(np.int64)


def destinations(
    split: NDArray[np.int8], names: list[str], order: Integers
) -> tuple[Integers, dict[str, tuple[int, int]]]:
    """Return the place of each row among all splits laid end to end, (N,), and each split's first and last place.

    The last place is excluded. Inside a split rows are in the order of ``order``. Raises EmptyDatasetError for a
    split without rows.
    """
    counts = np.bincount(split, minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise EmptyDatasetError(
            f"splits {', '.join(map(repr, empty))}: got no rows of {len(split)}; give them more, or leave them out"
        )
    ends = np.cumsum(counts)
    target = np.empty(len(split), np.int64)
    target[order[np.argsort(split[order], kind="stable")]] = np.arange(len(split))
    return target, {name: (int(e - c), int(e)) for name, c, e in zip(names, counts, ends, strict=True)}


def _consecutive(order: Integers, counts: Sequence[int]) -> NDArray[np.int8]:
    split = np.empty(len(order), np.int8)
    split[order] = np.repeat(np.arange(len(counts), dtype=np.int8), counts)
    return split


def _counts(length: int, splits: Mapping[str, float]) -> list[int]:
    values = list(splits.values())
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in values)
    if not good or abs(sum(values) - 1) > 1e-6:
        raise DataError(f"splits: got {dict(splits)}, wanted fractions above 0 that add up to 1")
    counts = [int(length * value) for value in values]
    counts[0] += length - sum(counts)
    return counts
