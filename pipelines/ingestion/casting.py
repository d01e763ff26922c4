"""Casts that keep every value, or are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, LabelError


def cast(
    values: NDArray[Any], dtype: np.dtype, *, name: str, first_row: int, allow_missing: bool, classes: bool
) -> NDArray[Any]:
    """Return a block (n, ...) in ``dtype``; ``name`` and ``first_row`` locate it in error messages.

    Raises DataError for a value that the cast would change, or that is missing or infinite unless
    ``allow_missing``; LabelError for a negative label if the values are ``classes``.
    """
    if values.dtype.kind == "f" and not allow_missing:
        _refuse(
            ~np.isfinite(values),
            f"array {name!r}: got values that are missing or infinite",
            first_row,
            "pass missing='drop', a fill such as 'mean', or missing='keep'",
        )
    if classes and (bad := values < 0).any():
        raise LabelError(
            f"target {name!r}: got a label of {values[bad].min()} at row {first_row + _first(bad)}, wanted 0 or more; "
            "pass relabel=True to renumber the labels, or classify=False if they are not classes"
        )
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        changed = values.astype(dtype)
        if values.dtype.kind == "f" and dtype.kind == "f":
            lost = np.isfinite(values) & ~np.isfinite(changed)
        else:
            lost = changed.astype(values.dtype) != values
    what = f"array {name!r}: got a value of {values.dtype} that {dtype} cannot hold"
    _refuse(lost, what, first_row, "choose another dtype (dtypes=...)")
    return changed


def _refuse(bad: NDArray[np.bool_], what: str, first_row: int, advice: str) -> None:
    if bad.any():
        raise DataError(f"{what}, first in row {first_row + _first(bad)}; {advice}")


def _first(bad: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
