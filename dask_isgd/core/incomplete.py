"""Rows with missing values, NaN or infinity, in a run that was told to continue without them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.storage import Rows


def incomplete(rows: Rows) -> NDArray[np.bool_]:
    """Return (B,) which rows hold NaN or infinity in an input or in the target."""
    bad = np.zeros(len(rows.target), bool)
    for values in (*rows.inputs, rows.target):
        if values.dtype.kind == "f":
            bad |= ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return bad


def replaced(rows: Rows, bad: NDArray[np.bool_]) -> Rows:
    """Return the rows with a copy of the first complete row, or zeros, in the place of each ``bad`` one (B,).

    What they stand for must not count: models and losses get numbers that they can compute with, no more.
    """
    good = np.flatnonzero(~bad)

    def filled(values: NDArray[np.generic]) -> NDArray[np.generic]:
        values = values.copy()
        values[bad] = values[good[0]] if len(good) else np.zeros((), values.dtype)
        return values

    return Rows(tuple(filled(values) for values in rows.inputs), filled(rows.target))


def complete_only(rows: Rows) -> Rows:
    """Return the complete rows."""
    good = ~incomplete(rows)
    return rows if good.all() else Rows(tuple(values[good] for values in rows.inputs), rows.target[good])
