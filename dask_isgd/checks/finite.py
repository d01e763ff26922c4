"""Missing values in the data of a run are found before it trains: one NaN would end it at an unknown step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from dask_isgd.core.batch import Prepare
from dask_isgd.core.loss import Loss
from dask_isgd.errors import DataError
from dask_isgd.storage import Dataset, Rows

logger = logging.getLogger(__name__)

_SCANNED_BYTES = 256 << 20
_TRIED_ROWS = 8


@dataclass
class MissingValues:
    """What a scan found."""

    array: str = ""
    """The array with the first missing value."""
    count: int = 0
    rows: list[int] = field(default_factory=list)
    """The first rows with a missing value."""
    share: float = 1.0
    """Share of the chunks that were scanned."""


def check_finite(dataset: Dataset, module: nn.Module, loss: Loss, *, skip: bool) -> None:
    """Raise DataError if rows hold NaN or infinity, unless the run skips them or its loss is finite for such rows.

    A dataset that ``ingest`` checked is not read; of others up to 256 MiB are, in chunks spread over all rows.
    """
    if dataset.attributes.get("finite") is True:
        return
    found = find_missing(dataset)
    if not found.count:
        return
    seen = "" if found.share == 1.0 else f" in the {found.share:.0%} of the chunks that were scanned"
    what = f"{found.count:,} rows of {dataset!r} hold NaN or infinity{seen}, the first is row {found.rows[0]}"
    if skip:
        logger.warning("%s; they are left out", what)
    elif not _is_finite(dataset, module, loss, found.rows):
        raise DataError(
            f"array {found.array!r}: {what}, for which the loss is not finite. Fill or drop them with "
            "dask_isgd.pipelines.ingest(…, missing=…), or pass Scoring(skip_bad_chunks=True) to train without them"
        )


def find_missing(dataset: Dataset) -> MissingValues:
    """Return the rows with missing values in the chunks that are scanned; an unreadable chunk is passed over."""
    names = [name for name, array in dataset.arrays.items() if array.dtype.kind == "f"]
    size = sum(dataset.arrays[name].size * dataset.arrays[name].dtype.itemsize for name in names)
    found = MissingValues()
    if not names or not dataset.n_chunks:
        return found
    found.share = min(1.0, max(1, int(_SCANNED_BYTES / size * dataset.n_chunks)) / dataset.n_chunks) if size else 1.0
    for chunk in np.unique(np.linspace(0, dataset.n_chunks - 1, round(found.share * dataset.n_chunks)).astype(int)):
        bad = np.zeros(0, bool)
        for name in names:
            try:
                values = dataset.chunk_of_array(name, int(chunk))
            except DataError:  # the run itself reports it, or leaves it out
                continue
            here = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
            found.array = found.array or (name if here.any() else "")
            bad = here | bad if len(bad) else here
        found.count += int(bad.sum())
        rows = np.flatnonzero(bad) + int(chunk) * dataset.chunk_size
        found.rows += rows[: _TRIED_ROWS - len(found.rows)].tolist()
    return found


def _is_finite(dataset: Dataset, module: nn.Module, loss: Loss, rows: list[int]) -> bool:
    """Return whether model and loss cope with these rows."""
    read: Rows = dataset.rows(rows)
    inputs, targets = Prepare(dataset, torch.device("cpu"))(read.inputs, read.target)
    module.eval()
    with torch.no_grad():
        try:
            return bool(torch.isfinite(loss(module(*inputs), targets)).all())
        except (RuntimeError, TypeError, ValueError, IndexError):
            return True  # it fails for other reasons, which the trial of the model names
