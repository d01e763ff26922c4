"""The data of a run: a dataset, or an object in memory that is written once beside the run directory."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from dask.utils import format_bytes
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.storage import Dataset, write_dataset
from dask_isgd.storage.backends.stores import local_path, redact
from dask_isgd.storage.data.prepared import prepare
from dask_isgd.storage.tables.frames import FrameTable
from dask_isgd.storage.tables.in_memory import table_of
from dask_isgd.storage.tables.table import NUMBERS, Table, likely_target

logger = logging.getLogger(__name__)

_LARGEST = 512 << 20
"""Bytes of data in memory that are written without being asked."""
_CHUNKS, _MIN_CHUNK_ROWS = 64, 32
_INGEST = "write it with dask_isgd.pipelines.ingest(data, 'data.zarr', …) and pass its path"


def dataset_of(data: Any, run_dir: str | Path) -> Dataset:
    """Return the dataset that ``fit`` was given: a `Dataset`, a path or URL, or an object in memory (see `table_of`).

    An object in memory is written as it is, in its order and not normalised, beside the run directory under a name
    that follows from its content, so that several runs and a resumed one share it. The numbers of a frame become one
    input, ``features``. Raises DataError if the data are large, lie elsewhere, or are not numbers.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, (str, Path)):
        return Dataset(str(data))
    arrays = _arrays(table_of(data))
    target = likely_target(arrays)
    inputs = [name for name in arrays if name != target]
    if not inputs:
        raise DataError(f"data: got no input besides the target {target!r}, wanted at least one")
    place = local_path(run_dir)
    if place is None:
        raise DataError(f"data: got data in memory for a run at {redact(run_dir)}, wanted a dataset there; {_INGEST}")
    identity = {"data": _digest(arrays), "version": 1}
    url = place.parent / f"data-{identity['data']}.zarr"
    rows = len(arrays[target])

    def build(work: Path) -> None:
        chunk = max(_MIN_CHUNK_ROWS, math.ceil(rows / _CHUNKS))
        write_dataset(work / "data.zarr", "train", arrays, inputs=inputs, target=target, chunk_size=chunk)

    if not url.exists():
        size = format_bytes(sum(values.nbytes for values in arrays.values()))
        logger.warning("data in memory (%s rows, %s) are written to %s, as they are: in their order, not normalised. "
                       "Delete it when its runs are no longer needed", f"{rows:,}", size, url)  # fmt: skip
    return Dataset(prepare(url, identity, build), group="train")


def _arrays(table: Table) -> dict[str, NDArray[Any]]:
    """Return all columns of a table as arrays, float64 as float32, the numbers of a frame side by side."""
    text = [name for name, column in table.columns.items() if column.dtype.kind not in NUMBERS]
    if text:
        raise DataError(f"data: got strings or objects in {text}, wanted numbers; {_INGEST}, which codes strings")
    row = sum(math.prod(column.shape) * column.dtype.itemsize for column in table.columns.values())
    if table.length * row > _LARGEST:
        size, limit = format_bytes(table.length * row), format_bytes(_LARGEST)
        raise DataError(f"data: got {size} in memory, wanted at most {limit}; {_INGEST}")
    arrays = table.read(0, table.length, list(table.columns))
    arrays = {name: np.asarray(v, np.float32) if v.dtype == np.float64 else v for name, v in arrays.items()}
    if not isinstance(table, FrameTable):
        return arrays
    target = likely_target(arrays)
    columns = [values for name, values in arrays.items() if name != target]
    if any(values.ndim > 1 for values in columns):
        return arrays
    return {"features": np.stack(columns, axis=1).astype(np.float32), target: arrays[target]}


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, values in arrays.items():
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]
