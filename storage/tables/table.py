"""A table: named columns that share a first dimension and are read one block of rows at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, IsgdError
from dask_isgd.storage.data.layout import TARGET_NAMES
from dask_isgd.storage.data.writing import Column

_SAMPLED_ROWS = 4
_VALUES = 1 << 20
NUMBERS, INTEGERS, TEXT = "biuf", "biu", "OUST"
"""Kinds of numpy dtypes."""


class Table(Protocol):
    """Rows that need not fit into memory. A table can be pickled, so that the workers of a cluster can read it."""

    length: int

    @property
    def columns(self) -> Mapping[str, Column]:
        """Shape and dtype of each column."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the target's classes in the order of their numbers; None if the source has none."""

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return rows ``start`` to ``stop`` (excluded) of the columns ``names``."""

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """Return spans that cover all rows in order, each of at most ``rows`` rows if the source allows it."""


@contextmanager
def reading(place: Any) -> Iterator[None]:
    """Convert whatever a library raises about a file that it cannot read into DataError, which names ``place``."""
    try:
        yield
    except (IsgdError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{place}: cannot be read ({reason[:400]}); is the file complete, and of this kind?") from error


def even_blocks(length: int, rows: int) -> list[tuple[int, int]]:
    """Return spans of ``rows`` rows that cover ``length`` rows in order; the last may be shorter."""
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def is_missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where values (n, ...) are missing: NaN, NaT, None or ``pandas.NA``."""
    if values.dtype.kind == "O":
        import pandas

        return np.asarray(pandas.isna(values))
    if values.dtype.kind in "fc":
        return np.asarray(np.isnan(values))
    return np.asarray(np.isnat(values)) if values.dtype.kind in "mM" else np.zeros(values.shape, bool)


def likely_target(known: Iterable[str]) -> str:
    """Return ``"target"``, ``"label"`` or ``"y"``, whichever is a column. Raises DataError unless one of them is."""
    likely = [name for name in TARGET_NAMES if name in known]
    if len(likely) != 1:
        raise DataError(
            f"target: got none, wanted target=... because exactly one of 'target', 'label', 'y' must be among the "
            f"columns {sorted(known)} for a default"
        )
    return likely[0]


def scalars(table: Table, name: str) -> NDArray[Any]:
    """Return all values of a column, (N,). Raises DataError if its rows are arrays."""
    values = np.concatenate([table.read(start, stop, [name])[name] for start, stop in table.blocks(_VALUES)])
    if values.ndim != 1:
        raise DataError(f"column {name!r}: got rows of shape {values.shape[1:]}, wanted one value per row")
    return values


def distinct(table: Table, name: str) -> tuple[Any, ...]:
    """Return the distinct values of a column that are not missing, sorted. Raises DataError if they have no order."""
    found: set[Any] = set()
    for start, stop in table.blocks(_VALUES):
        values = table.read(start, stop, [name])[name]
        found.update(values[~is_missing(values)].tolist())
    try:
        return tuple(sorted(found))
    except TypeError as error:
        raise DataError(f"column {name!r}: got values of several types ({error}), wanted only strings") from error


def fingerprint(table: Table, names: Sequence[str]) -> dict[str, Any]:
    """Return, as JSON, what distinguishes a table: length, shapes, dtypes, and a hash of the first and last rows."""
    digest = hashlib.sha256()
    for start, stop in ((0, min(_SAMPLED_ROWS, table.length)), (max(0, table.length - _SAMPLED_ROWS), table.length)):
        for name, values in sorted(table.read(start, stop, names).items()):
            digest.update(name.encode())
            digest.update(repr(values.tolist()).encode() if values.dtype.kind in TEXT else values.tobytes())
    columns = {name: [str(table.columns[name].dtype), list(table.columns[name].shape)] for name in names}
    described: dict[str, Any] = json.loads(
        json.dumps({"length": table.length, "columns": columns, "sampled": digest.hexdigest()})
    )
    return described
