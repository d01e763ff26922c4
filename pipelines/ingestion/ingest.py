"""Any table of examples becomes a dataset to train on: shuffled, split, chunked, normalised, checked.

>>> from dask_isgd.pipelines import ingest
>>> ingest(xarray.open_dataset("weather.nc"), "weather.zarr", inputs=["t", "p"], target="rain",
...        dimension="time", time="time", splits={"train": 0.8, "test": 0.2})          # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.utils import parse_bytes
from numpy.typing import NDArray

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.pipelines.ingestion import splits as splitting
from dask_isgd.pipelines.ingestion.passes import ShufflePlan, collect, scatter
from dask_isgd.pipelines.ingestion.prepared import finished, place, sweep
from dask_isgd.pipelines.ingestion.statistics import Moments, mode_of
from dask_isgd.pipelines.ingestion.tables import Table, fingerprint, open_table
from dask_isgd.storage.backends.folder import PARTIAL, writing
from dask_isgd.storage.backends.local import temporary
from dask_isgd.storage.backends.stores import local_path
from dask_isgd.storage.data.writing import Column, create_split, finish_split

if TYPE_CHECKING:
    from distributed import Client

VERSION = 1
SPLITS = {"train": 0.9, "validation": 0.1}
_CHUNK_BYTES = 2 << 20
_MOST_CHUNK = 8192


def ingest(
    source: Any,
    url: str | Path,
    *,
    inputs: str | Sequence[str] | None = None,
    target: str | None = None,
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
    missing: str = "refuse",
    compressed: bool = False,
    memory: int | str = "256MB",
    scratch: str | Path | None = None,
    client: Client | None = None,
) -> str:
    """Write ``source`` as a dataset at ``url``, a path or URL; returns ``url``.

    source
        An ``xarray.Dataset``, arrays by name, or what `ingest_tables.open_table` knows: files of xarray's or
        numpy's, image folders, Parquet.
    inputs, target
        Names. Default: the target is ``target``, ``label`` or ``y``, the inputs are all else that is a number.
    dimension
        The dimension that counts examples, for xarray: default ``"sample"``. It is called ``sample`` afterwards.
    splits
        Fractions by name, of the rows: ``{"train": 0.9, "validation": 0.1}``. With ``group`` (a column) all rows
        of a group go into one split; with ``time`` (a column or coordinate) what is earlier goes into the split
        named earlier, and values may be moments, each the end of its split.
    shuffle, seed
        Rows of a split come in a random order, a real permutation of them all. Chunks must be samples
        of the whole for scores to be comparable and a pool of chunks to be useful: leave it on.
    chunk_size
        Rows a chunk; default: about 2 MB, at most 8192.
    dtypes
        By name. Default: float64 becomes float32. A cast that changes an integer, or makes a float infinite, is an
        error.
    normalise
        By input or for all: ``"all"`` (one mean and deviation), ``"each"`` (of every number of a row), ``"first"``,
        ``"last"`` (along that axis of a row), ``"none"``, ``"auto"``: floats, and bytes in two dimensions or more. Of
        the split ``train`` alone, or the first where none has that name.
    classify
        Whether the target is a class; default: it is if it is an integer, a boolean or a string. Strings, and with
        ``relabel`` any values, become the numbers of their sorted values. Counts and names are kept.
    missing
        ``"refuse"`` NaN and infinity, or ``"keep"`` them.
    memory
        Bytes of rows in memory at a time; on a cluster, in each task.
    scratch
        Folder for one uncompressed copy of the rows while this runs; default: beside ``url``, or the
        system's temporary one for a remote one. On a cluster all workers must see it, and write to it.
    client
        Runs blocks and buckets on its cluster instead of here.

    Nothing is at ``url`` before all of it is; called again after a crash it goes on where it was, as long as
    source and settings are the same, and a dataset that is complete is used as it is.
    Raises DataError and its kind, StorageFullError.
    """
    table = open_table(source, dimension=dimension)
    roles = _Roles(table, inputs, target, group, time, classify, relabel, dtypes or {})
    modes = _modes(normalise, roles)
    wanted = dict(splits if splits is not None else SPLITS)
    if missing not in ("refuse", "keep"):
        raise DataError(f"missing: got {missing!r}, wanted 'refuse' or 'keep'")
    if not wanted or (group is not None and time is not None):
        raise DataError("splits: got none, or both group and time; wanted fractions, and one of these at most")
    row_bytes = max(1, sum(_row_bytes(column) for column in roles.columns.values()))
    held_bytes = max(row_bytes, sum(_row_bytes(table.columns[name]) for name in roles.columns))
    chunk = chunk_size if chunk_size is not None else max(1, min(_MOST_CHUNK, _CHUNK_BYTES // row_bytes))
    if chunk < 1:
        raise DataError(f"chunk_size: got {chunk}, wanted at least 1")
    identity = {
        "ingest": VERSION,
        "source": fingerprint(table, roles.read),
        "columns": {name: [column.dtype.str, list(column.shape)] for name, column in roles.columns.items()},
        "inputs": list(roles.inputs),
        "target": roles.target,
        "splits": {name: value if isinstance(value, (int, float)) else str(value) for name, value in wanted.items()},
        "settings": [group, time, shuffle, seed, chunk, roles.classify, relabel, missing, compressed],
        "normalise": modes,
    }
    budget = int(parse_bytes(memory))

    def build(work: Path) -> None:
        plan = _plan(table, roles, work, wanted, group, time, shuffle, seed, chunk, missing, budget // held_bytes)
        _each(scatter, plan, len(plan.blocks), client)
        if not plan.data.exists():
            _create(plan, chunk, compressed)
        _each(collect, plan, len(plan.buckets), client)
        _finish(plan, list(wanted), modes, compressed)
        shutil.rmtree(work / "blocks", ignore_errors=True)

    return _whole(str(url), identity, build, scratch)


class _Roles:
    """Which column is what, and how it is written."""

    def __init__(
        self,
        table: Table,
        inputs: str | Sequence[str] | None,
        target: str | None,
        group: str | None,
        time: str | None,
        classify: bool | None,
        relabel: bool,
        dtypes: Mapping[str, str],
    ) -> None:
        known = table.columns
        if table.length < 1:
            raise EmptyDatasetError("source: got no rows, wanted at least one")
        if target is None:
            likely = [name for name in ("target", "label", "y") if name in known]
            if len(likely) != 1:
                raise DataError(f"target: got none, and cannot tell it among {sorted(known)}; pass target=...")
            target = likely[0]
        numbers = [n for n, c in known.items() if c.dtype.kind in "biuf" and n not in (target, group, time)]
        given = [inputs] if isinstance(inputs, str) else list(inputs) if inputs is not None else numbers
        for name in (*given, target, *(n for n in (group, time) if n is not None)):
            if name not in known:
                raise DataError(f"got no column {name!r}; there are {sorted(known)}")
        unknown = dtypes.keys() - {*given, target}
        if unknown or not given or target in given or len(set(given)) < len(given):
            raise DataError(
                f"got inputs {given}, target {target!r}, dtypes of {sorted(dtypes)}; wanted each once, "
                f"at least one input, and dtypes of these alone; there are {sorted(known)}"
            )
        kind = known[target].dtype.kind
        self.classify = classify if classify is not None else kind in "biuOUST" and not known[target].shape
        self.names: tuple[Any, ...] | None = None
        if self.classify and (relabel or kind in "OUST"):
            self.names = _values_of(table, target)
        elif kind not in "biuf" or (self.classify and kind == "f"):
            raise DataError(f"target {target!r}: got {known[target].dtype}, wanted numbers, or integers for classes")
        self.inputs, self.target = tuple(given), target
        self.columns = {name: Column(known[name].shape, _dtype(known[name], dtypes.get(name), name)) for name in given}
        if self.names is not None:
            self.columns[target] = Column((), np.dtype("i8"))
        else:
            self.columns[target] = Column(known[target].shape, _dtype(known[target], dtypes.get(target), target))
        self.read = sorted({*self.columns, *(n for n in (group, time) if n is not None)})


def _dtype(column: Column, wanted: str | None, name: str) -> np.dtype:
    if column.dtype.kind not in "biuf":
        raise DataError(f"array {name!r}: got {column.dtype}, wanted booleans, integers or floats")
    if wanted is None:
        return np.dtype("f4") if column.dtype == np.float64 else column.dtype.newbyteorder("=")
    try:
        dtype = np.dtype(wanted)
    except TypeError:
        dtype = np.dtype("O")
    if dtype.kind not in "biuf":
        raise DataError(f"dtypes of {name!r}: got {wanted!r}, wanted a boolean, integer or float such as 'uint8'")
    return dtype


def _values_of(table: Table, name: str) -> tuple[Any, ...]:
    found: set[Any] = set()
    for start, stop in table.blocks(1 << 20):
        found.update(np.unique(table.read(start, stop, [name])[name]).tolist())
    return tuple(sorted(found))


def _modes(normalise: str | Mapping[str, str], roles: _Roles) -> dict[str, str]:
    given = dict.fromkeys(roles.inputs, normalise) if isinstance(normalise, str) else dict(normalise)
    unknown = given.keys() - set(roles.inputs)
    if unknown:
        raise DataError(f"normalise: got {sorted(unknown)}, wanted inputs: {list(roles.inputs)}")
    columns = {name: roles.columns[name] for name in roles.inputs}
    return {name: mode_of(given.get(name, "auto"), c.dtype, c.shape) for name, c in columns.items()}


def _plan(
    table: Table,
    roles: _Roles,
    work: Path,
    splits: Mapping[str, Any],
    group: str | None,
    time: str | None,
    shuffle: bool,
    seed: int,
    chunk: int,
    missing: str,
    rows: int,
) -> ShufflePlan:
    generator = np.random.default_rng(seed)
    order = generator.permutation(table.length) if shuffle else np.arange(table.length)
    if group is not None:
        split = splitting.by_group(_column(table, group), splits, generator)
    elif time is not None:
        split = splitting.by_time(_column(table, time), splits)
    else:
        split = splitting.by_fraction(order, splits)
    target, ranges = splitting.destinations(split, list(splits), order)
    work.mkdir(parents=True, exist_ok=True)
    partial = temporary(work / "destinations.npy")
    with writing(work), partial.open("wb") as file:
        np.save(file, target)
    os.replace(partial, work / "destinations.npy")
    size = chunk * max(1, rows // 2 // chunk)
    buckets = [
        (name, first, start, min(start + size, last))
        for name, (first, last) in ranges.items()
        for start in range(first, last, size)
    ]
    return ShufflePlan(
        table=table,
        work=work,
        columns=roles.columns,
        inputs=roles.inputs,
        target=roles.target,
        names=roles.names,
        classify=roles.classify,
        missing=missing,
        # Reading may take a copy of the block, casting and its check two more.
        blocks=tuple(table.blocks(max(1, rows // 4))),
        buckets=tuple(buckets),
    )


def _column(table: Table, name: str) -> NDArray[Any]:
    parts = [table.read(start, stop, [name])[name] for start, stop in table.blocks(1 << 20)]
    values = np.concatenate(parts)
    if values.ndim != 1:
        raise DataError(f"column {name!r}: got rows of shape {values.shape[1:]}, wanted one value each")
    return values


def _each(task: Callable[[ShufflePlan, int], int], plan: ShufflePlan, count: int, client: Client | None) -> None:
    """Run all of a pass: here, or on a cluster, where what fails ends it."""
    if client is None:
        for i in range(count):
            task(plan, i)
        return
    from distributed import as_completed

    shared = client.scatter(plan, broadcast=True)
    futures = client.map(task, [shared] * count, range(count), pure=False)
    try:
        for future in as_completed(futures):
            future.result()
    finally:
        client.cancel(futures)


def _create(plan: ShufflePlan, chunk: int, compressed: bool) -> None:
    """All splits with no rows yet; in place at once, so that a resumed run meets all or none."""
    partial = temporary(plan.data)
    lengths: dict[str, int] = {}
    for split, _, start, stop in plan.buckets:
        lengths[split] = lengths.get(split, 0) + stop - start
    for split, length in lengths.items():
        create_split(str(partial), split, plan.columns, length, chunk, compressed=compressed)
    os.replace(partial, plan.data)


def _finish(plan: ShufflePlan, splits: Sequence[str], modes: Mapping[str, str], compressed: bool) -> None:
    """Merge the statistics in the order of the buckets, so that they are the same bits however it ran."""
    first = "train" if "train" in splits else splits[0]
    totals: dict[str, Moments] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for i in range(len(plan.buckets)):
        with np.load(plan.bucket(i)) as found:
            split = str(found["split"])
            if "counts" in found:
                counts[split] = _added(counts.get(split, np.zeros(0, np.int64)), found["counts"])
            for name in plan.inputs if split == first else ():
                part = Moments(int(found[f"{name}/count"]), found[f"{name}/mean"], found[f"{name}/spread"])
                totals[name] = totals[name] + part if name in totals else part
    classes = max((len(c) for c in counts.values()), default=0)
    if plan.names is not None:
        classes = len(plan.names)
    constants = {name: totals[name].constants(mode) for name, mode in modes.items() if mode != "none"}
    for split in splits:
        attributes: dict[str, Any] = {
            "inputs": list(plan.inputs),
            "target": plan.target,
            "classes": classes if plan.classify else None,
        }
        if plan.classify:
            attributes["class_counts"] = _added(np.zeros(classes, np.int64), counts[split]).tolist()
            attributes["class_names"] = _class_names(plan)
        finish_split(str(plan.data), split, plan.columns, attributes, constants, compressed=compressed)


def _class_names(plan: ShufflePlan) -> list[str] | None:
    if plan.names is not None:
        return [str(name) for name in plan.names]
    names = getattr(plan.table, "names", None)
    return [str(name) for name in names] if names is not None else None


def _added(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def _row_bytes(column: Column) -> int:
    return int(np.prod(column.shape, dtype=np.int64)) * column.dtype.itemsize


def _whole(url: str, identity: Mapping[str, Any], build: Callable[[Path], None], scratch: str | Path | None) -> str:
    """Build in a folder whose name says of what, then put its dataset at ``url`` in one move."""
    if finished(url, identity):
        return url
    here = local_path(url)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    name = (here or Path(url.rstrip("/").rpartition("/")[2])).name
    parent = Path(scratch) if scratch is not None else here.parent if here is not None else Path(tempfile.gettempdir())
    work = parent / f".{name}.{digest}{PARTIAL}"
    with writing(work):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent, name, keep=work)
        build(work)
    place(work / "data.zarr", url, identity)
    shutil.rmtree(work, ignore_errors=True)
    return url
