"""Ingestion: a table of examples becomes a dataset to train on.

>>> from dask_isgd.pipelines import ingest
>>> ingest(xarray.open_dataset("weather.nc"), "weather.zarr", inputs=["t", "p"], target="rain",
...        dimension="time", time="time", splits={"train": 0.8, "test": 0.2})          # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.utils import parse_bytes

from dask_isgd.errors import DataError
from dask_isgd.pipelines.ingestion.assembly import create_splits, finish_splits
from dask_isgd.pipelines.ingestion.coding import CodingRule, FeatureNames, code_columns
from dask_isgd.pipelines.ingestion.columns import Columns, choose_columns
from dask_isgd.pipelines.ingestion.missing import MissingRule
from dask_isgd.pipelines.ingestion.passes import collect, run_pass, scatter
from dask_isgd.pipelines.ingestion.plan import SplitRule, make_plan, require_countable, require_room
from dask_isgd.pipelines.ingestion.statistics import mode_of
from dask_isgd.pipelines.ingestion.tables.opening import open_table
from dask_isgd.storage.data.prepared import prepare
from dask_isgd.storage.data.writing import require_names
from dask_isgd.storage.tables.table import fingerprint

if TYPE_CHECKING:
    from distributed import Client

VERSION = 1
SPLITS = {"train": 0.9, "validation": 0.1}
_CHUNK_BYTES = 2 << 20
_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 64, 8192
_CHUNKS = 64


def ingest(
    source: Any,
    url: str | Path,
    *,
    inputs: str | Sequence[str] | None = None,
    target: str | None = None,
    features: FeatureNames | None = None,
    categorical: Sequence[str] | None = None,
    dimension: str | None = None,
    splits: Mapping[str, Any] | None = None,
    group: str | None = None,
    time: str | None = None,
    shuffle: bool = True,
    seed: int = 0,
    chunk_size: int | None = None,
    dtypes: Mapping[str, str] | None = None,
    normalise: str | Mapping[str, str] = "auto",
    classify: bool | None = None,
    relabel: bool = False,
    missing: MissingRule = "refuse",
    mask: bool = False,
    compressed: bool = False,
    memory: int | str = "256MB",
    scratch: str | Path | None = None,
    client: Client | None = None,
    identity: Mapping[str, Any] | None = None,
) -> str:
    """Write ``source`` as a dataset at ``url``, a path or URL, and return ``url``.

    source
        What `tables.opening.open_table` opens. In memory: an ``xarray.Dataset``; a mapping or tuple of arrays or
        tensors, numpy's, torch's, Zarr's or Dask's, whose chunks need not agree; a map-style
        ``torch.utils.data.Dataset``; a ``datasets.Dataset``; a pandas or Dask frame; a ``zarr.Group``. Or the path or
        URL of a Zarr group of any format, of a file of xarray, numpy, Parquet or CSV, or of a folder of images.
    inputs, target
        Names of columns. Default: the target is ``target``, ``label`` or ``y`` (of a tuple the last array); the inputs
        are the features, and without any all other columns of numbers. An input of strings is coded as integers, the
        indices of its categories, for an embedding.
    features
        Columns with one number or string per row that are written side by side as one input ``features`` (N, F) of
        float32, or a mapping of names to such columns. Strings are one-hot coded; numbers are normalised, integers
        too. Default: all columns of numbers of a frame, none of other sources.
    categorical
        Columns of numbers that are coded like strings.
    dimension
        The dimension that counts examples, for xarray; default ``"sample"``. The dataset calls it ``sample``.
    splits
        Fractions of the rows by name; default ``{"train": 0.9, "validation": 0.1}``. With ``group`` (a column) all
        rows of a group are in one split. With ``time`` (a column or coordinate) earlier rows are in the split that is
        named earlier, and values may be moments, each the end of its split. Instead of fractions: arrays with the row
        numbers of each split, in the order in which they are written; every row must be listed once.
    shuffle, seed
        Rows of a split are written in random order, a permutation of all of them. Leave this on: chunks must be
        samples of the whole for scores to be comparable.
    chunk_size
        Rows per chunk; default: a sixty-fourth of the rows, from 64 to 8192, and at most about 2 MB.
    dtypes
        Dtypes by name. Default: float64 becomes float32. A cast that changes an integer or makes a float infinite is
        an error.
    normalise
        Per input or for all: ``"all"`` (one mean and deviation), ``"each"`` (of every number of a row), ``"first"``,
        ``"last"`` (along that axis of a row), ``"none"``, or ``"auto"``: floats, and bytes in two or more dimensions.
        Constants are those of the split ``train``, or of the first split if none has that name.
    classify
        Whether the target is a class; default: it is if it is an integer, a boolean or a string. Strings, and with
        ``relabel`` any values, are numbered in sorted order. Class counts and names are stored.
    missing
        What to do about NaN, None and NA: ``"refuse"`` or ``"keep"`` them, ``"drop"`` rows that lack a value, or fill
        features and inputs with the ``"mean"`` or ``"median"`` of the training split, with a number, or as a mapping
        of columns to these or to a string prescribes. What was filled is logged and recorded. Infinity is refused
        unless values are kept.
    mask
        Beside the features that were filled, write whether the value was missing, as 0 or 1.
    compressed
        Whether chunks are compressed (zstd).
    memory
        Bytes of rows in memory at a time; on a cluster, in each task.
    scratch
        Folder for one uncompressed copy of the rows during ingestion; default: beside ``url``, or the system's
        temporary folder if ``url`` is remote. On a cluster all workers must be able to read and write it.
    client
        Runs blocks and buckets as tasks on this client's cluster.
    identity
        What the dataset is, as plain JSON, in place of a fingerprint of the source and the settings. An interrupted
        ingestion then starts again from the beginning, because the source may have changed.

    The dataset appears at ``url`` only when it is complete. After a crash, the same call resumes the work, provided
    that source and settings are the same. A complete dataset is used as it is.
    Raises DataError and its subclasses, StorageFullError.
    """
    splitting = SplitRule(
        splits=dict(splits if splits is not None else SPLITS), group=group, time=time, shuffle=shuffle, seed=seed
    )
    require_names(splitting.splits, "splits")
    rule = CodingRule(
        inputs=inputs,
        target=target,
        features=features,
        categorical=tuple(categorical or ()),
        missing=missing,
        mask=mask,
    )
    source_table = open_table(source, dimension=dimension, names=_named(rule, splitting))
    require_countable(source_table)
    coded = code_columns(source_table, rule, splitting)
    table, keep = coded.table, missing == "keep"
    columns = choose_columns(
        table,
        inputs=coded.inputs,
        target=coded.target,
        split_by=splitting.column,
        classify=classify,
        relabel=relabel,
        dtypes=dtypes or {},
    )
    modes = _modes(normalise, columns)
    chunk = chunk_size if chunk_size is not None else _chunk_rows(table.length, columns.row_bytes)
    if chunk < 1:
        raise DataError(f"chunk_size: got {chunk}, wanted at least 1")
    budget = int(parse_bytes(memory))
    require_room(table, columns, budget, chunk)

    def build(work: Path) -> None:
        plan = make_plan(table, columns, splitting, work, chunk_size=chunk, keep_missing=keep, memory=budget)
        run_pass(scatter, plan, len(plan.blocks), client)
        create_splits(plan, compressed=compressed)
        run_pass(collect, plan, len(plan.buckets), client)
        finish_splits(plan, coded.coding, modes, compressed=compressed)

    resumable = identity is None
    if identity is None:
        identity = {
            "ingest": VERSION,
            "source": fingerprint(table, sorted({*columns.written, *filter(None, [splitting.column])})),
            "columns": {name: [column.dtype.str, list(column.shape)] for name, column in columns.written.items()},
            "inputs": list(columns.inputs),
            "target": columns.target,
            "splits": {name: _described(value) for name, value in splitting.splits.items()},
            "settings": [group, time, shuffle, seed, chunk, columns.classify, relabel, str(missing), compressed],
            "coding": coded.coding.attributes(),
            "normalise": modes,
        }
    return prepare(url, identity, build, scratch=scratch, resumable=resumable)


def _named(rule: CodingRule, splits: SplitRule) -> list[str] | None:
    """Return the columns that the arguments name, if they name all that is read."""
    if rule.target is None or (rule.inputs is None and rule.features is None):
        return None
    inputs = [rule.inputs] if isinstance(rule.inputs, str) else [*(rule.inputs or ())]
    stacks = rule.features.values() if isinstance(rule.features, Mapping) else [rule.features or ()]
    return [
        *inputs,
        *(column for columns in stacks for column in columns),
        rule.target,
        *filter(None, [splits.column]),
    ]


def _chunk_rows(length: int, row_bytes: int) -> int:
    """Return the rows per chunk: so few that every scorer gets some chunks, so many that reads are worth their cost."""
    wanted = min(_MAX_CHUNK_ROWS, max(_MIN_CHUNK_ROWS, length // _CHUNKS))
    return max(1, min(wanted, _CHUNK_BYTES // row_bytes))


def _modes(normalise: str | Mapping[str, str], columns: Columns) -> dict[str, str]:
    """Return the mode of normalisation for each input."""
    given = dict.fromkeys(columns.inputs, normalise) if isinstance(normalise, str) else dict(normalise)
    unknown = given.keys() - set(columns.inputs)
    if unknown:
        raise DataError(f"normalise: got {sorted(unknown)}, wanted inputs: {list(columns.inputs)}")
    written = {name: columns.written[name] for name in columns.inputs}
    return {name: mode_of(given.get(name, "auto"), c.dtype, c.shape) for name, c in written.items()}


def _described(split: Any) -> Any:
    """Return the value of a split as plain JSON."""
    if isinstance(split, np.ndarray):
        return hashlib.sha256(split.astype(np.int64).tobytes()).hexdigest()
    return split if isinstance(split, (int, float)) else str(split)
