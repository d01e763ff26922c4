"""Targets on which training would fail: labels outside the classes."""

from __future__ import annotations

import numpy as np

from dask_isgd.errors import DataError, LabelError
from dask_isgd.storage.backends.stores import Array
from dask_isgd.storage.data.chunks import Chunks


def check_target(chunks: Chunks, target: Array, classes: int | None, known: int | None, *, classify: bool) -> None:
    """Read a target chunk by chunk and refuse labels outside ``classes``, or else outside the ``known`` classes.

    Arguments and errors are those of ``Dataset.check``.
    """
    name = target.basename
    if target.dtype.kind not in "iub":
        if classes is not None:
            raise LabelError(
                f"target {name!r}: got {target.dtype}, wanted integers in [0, {classes}). "
                "Store class indices as integers, or pass no classes for regression"
            )
        if target.dtype.kind != "f":
            raise DataError(f"target {name!r}: got {target.dtype}, wanted integers or floats")
        return
    classes = classes if classes is not None else known
    if classes is None and not classify:
        return
    least, most, first = _range(chunks, target, classes)
    if first is not None:
        wanted = f"0 to {classes - 1} ({classes} classes)" if classes is not None else "0 or more"
        raise LabelError(
            f"target {name!r}: got labels from {least} to {most}, wanted {wanted}; the first bad one "
            f"is at index {first}. Drop or relabel these examples (a label such as -100 would be ignored "
            "silently), or pass a loss of your own if the target is a number, not a class"
        )


def _range(chunks: Chunks, target: Array, classes: int | None) -> tuple[int, int, int | None]:
    """Return the smallest and largest label, and the index of the first one that is negative or not in ``classes``."""
    least, most, first = 0, 0, None
    for start, labels in chunks.all(target):
        low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
        least, most = (min(least, low), max(most, high)) if start else (low, high)
        if first is None and (low < 0 or (classes is not None and high >= classes)):
            bad = (labels < 0) | (labels >= classes if classes is not None else False)
            first = start + int(np.flatnonzero(bad.reshape(len(labels), -1).any(1))[0])
    return least, most, first
