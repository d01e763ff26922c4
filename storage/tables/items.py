"""Map-style datasets of torch and of Hugging Face, read item by item or as slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.storage.data.writing import Column
from dask_isgd.storage.tables.arrays import as_numpy
from dask_isgd.storage.tables.table import even_blocks, reading


class ItemTable:
    """A dataset with ``__len__`` and ``__getitem__``, such as a map-style ``torch.utils.data.Dataset``.

    An item is a mapping of names to values, or a tuple whose last value is the target: see `names_of`. Values are
    tensors, arrays, images or numbers, of one shape and dtype each.
    """

    def __init__(self, items: Any) -> None:
        self._items, self.length = items, len(items)
        names = getattr(items, "classes", None)
        known = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        self.class_names: Sequence[str] | None = list(names) if known and names is not None else None
        first = self._item(0) if self.length else {}
        self.columns = {name: Column(value.shape, value.dtype) for name, value in first.items()}

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found = {n: np.empty((stop - start, *self.columns[n].shape), self.columns[n].dtype) for n in names}
        for i in range(start, stop):
            item = self._item(i)
            for name, values in found.items():
                values[i - start] = self._fitting(i, name, item.get(name))
        return found

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)

    def _item(self, i: int) -> dict[str, NDArray[Any]]:
        with reading(f"item {i} of {type(self._items).__name__}"):
            item = self._items[i]
            if not isinstance(item, Mapping):
                item = names_of(item)
            return {str(name): as_numpy(value) for name, value in item.items()}

    def _fitting(self, i: int, name: str, value: NDArray[Any] | None) -> NDArray[Any]:
        wanted = self.columns[name]
        if value is None or value.shape != wanted.shape or not np.can_cast(value.dtype, wanted.dtype, "same_kind"):
            got = "nothing" if value is None else f"{value.dtype}{list(value.shape)}"
            raise DataError(
                f"item {i} of {type(self._items).__name__}: got {got} for {name!r}, wanted {wanted.dtype}"
                f"{list(wanted.shape)} as in item 0; pad, crop or convert the items"
            )
        return value


class HuggingFaceTable:
    """A ``datasets.Dataset``: one column of the table per column, sequences of equal length as arrays."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self.length = dataset.with_format("numpy"), len(dataset)
        labels = [getattr(f, "names", None) for f in dataset.features.values() if hasattr(f, "names")]
        self.class_names: Sequence[str] | None = labels[0] if len(labels) == 1 else None
        first = self._slice(0, min(1, self.length), list(dataset.column_names)) if self.length else {}
        self.columns = {name: Column(values.shape[1:], values.dtype) for name, values in first.items()}

    def read(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        return self._slice(start, stop, names)

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        return even_blocks(self.length, rows)

    def _slice(self, start: int, stop: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        with reading("datasets.Dataset"):
            found = self._dataset.select_columns(list(names))[start:stop]
        return {name: self._even(name, found[name]) for name in names}

    def _even(self, name: str, values: Any) -> NDArray[Any]:
        shapes = sorted({np.shape(value) for value in values})
        if len(shapes) > 1:
            raise DataError(f"column {name!r}: got values of shapes {shapes[:3]}, wanted one shape; pad or crop them")
        return np.asarray(values)


def names_of(values: Any) -> dict[str, Any]:
    """Return a tuple's values by name: the last is the target ``y``, the others ``x``, or ``x0``, ``x1``, ...

    Raises DataError if there are fewer than two.
    """
    if not isinstance(values, (tuple, list)) or len(values) < 2:
        raise DataError(
            f"source: got {type(values).__name__}{f' of {len(values)}' if isinstance(values, (tuple, list)) else ''}, "
            "wanted inputs and a target: (x, y), (x0, x1, y), or a mapping of names to arrays"
        )
    names = ["x"] if len(values) == 2 else [f"x{i}" for i in range(len(values) - 1)]
    return dict(zip([*names, "y"], values, strict=True))
