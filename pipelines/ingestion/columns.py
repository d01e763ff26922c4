"""Which columns of a table are written, as what, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_isgd.errors import DataError
from dask_isgd.storage.data.writing import Column, require_names
from dask_isgd.storage.tables.table import INTEGERS, NUMBERS, TEXT, Table, distinct


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a dataset that is made from a table."""

    inputs: tuple[str, ...]
    target: str
    written: Mapping[str, Column]
    """The inputs and the target, with the dtypes in which they are written."""
    classify: bool
    """Whether the target is a class."""
    class_values: tuple[Any, ...] | None
    """The target's values in the order of their class numbers; None if the target holds numbers already."""

    @property
    def row_bytes(self) -> int:
        """Bytes per row as written."""
        return row_bytes(self.written.values())


def choose_columns(
    table: Table,
    *,
    inputs: Sequence[str],
    target: str,
    split_by: str | None,
    classify: bool | None,
    relabel: bool,
    dtypes: Mapping[str, str],
) -> Columns:
    """Return the columns to write; arguments as in `ingest`, ``split_by`` being its ``group`` or ``time``.

    Raises DataError if the names or dtypes do not fit the table.
    """
    known = table.columns
    for name in (*inputs, target, *([split_by] if split_by is not None else [])):
        if name not in known:
            raise DataError(f"got no column {name!r}; there are {sorted(known)}")
    if dtypes.keys() - {*inputs, target} or not inputs or target in inputs or len(set(inputs)) < len(inputs):
        raise DataError(
            f"got inputs {list(inputs)}, target {target!r}, dtypes of {sorted(dtypes)}; wanted each column once, "
            f"at least one input, and dtypes of these columns only; there are {sorted(known)}"
        )
    require_names((*inputs, target), "columns")
    kind = known[target].dtype.kind
    classify = classify if classify is not None else kind in INTEGERS + TEXT and not known[target].shape
    values = distinct(table, target) if classify and (relabel or kind in TEXT) else None
    if values is None and (kind not in NUMBERS or (classify and kind == "f")):
        raise DataError(f"target {target!r}: got {known[target].dtype}, wanted numbers, or integers for classes")
    written = {name: Column(known[name].shape, _dtype(known[name], dtypes.get(name), name)) for name in inputs}
    if values is not None:
        written[target] = Column((), np.dtype("i8"))
    else:
        written[target] = Column(known[target].shape, _dtype(known[target], dtypes.get(target), target))
    return Columns(inputs=tuple(inputs), target=target, written=written, classify=classify, class_values=values)


def row_bytes(columns: Iterable[Column]) -> int:
    """Bytes per row, at least one."""
    return max(1, sum(int(np.prod(column.shape, dtype=np.int64)) * column.dtype.itemsize for column in columns))


def _dtype(column: Column, wanted: str | None, name: str) -> np.dtype:
    if column.dtype.kind not in NUMBERS:
        raise DataError(f"array {name!r}: got {column.dtype}, wanted booleans, integers or floats")
    if wanted is None:
        return np.dtype("f4") if column.dtype == np.float64 else column.dtype.newbyteorder("=")
    try:
        dtype = np.dtype(wanted)
    except TypeError:
        dtype = np.dtype("O")
    if dtype.kind not in NUMBERS:
        raise DataError(f"dtypes of {name!r}: got {wanted!r}, wanted a boolean, integer or float such as 'uint8'")
    return dtype
