"""What a dataset is opened from: a path or URL, or a Zarr store, group or xarray.Dataset that its user has opened."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore

from dask_isgd.errors import DataError
from dask_isgd.storage.backends.stores import normalise
from dask_isgd.storage.backends.zarr_internals import backing_array

_ADVICE = "pass the store or group itself, or write the variables with dask_isgd.pipelines.ingest"


@dataclass(frozen=True)
class Source:
    """Where the arrays of a dataset lie."""

    url: str
    """What names the place in messages; it opens the place if there is no ``store``."""
    store: Store | None = None
    group: str = ""
    """Path of a group in the store to which other groups are relative."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What is part of the fingerprint beside the arrays: the snapshot of a versioned store."""


def source_of(data: Any) -> Source:
    """Return the source of a path, URL, Zarr store or group, or xarray.Dataset; DataError for anything else.

    A versioned store (an Icechunk session) must be pinned to a snapshot, which its read-only sessions are.
    """
    if isinstance(data, (str, Path)):
        return Source(normalise(data))
    if hasattr(data, "data_vars"):  # an xarray.Dataset; to import xarray for a type check would take 100 MB
        arrays = [found for found in map(backing_array, data.variables.values()) if found is not None]
        if not arrays:
            raise DataError(f"xarray.Dataset: got no variable as it lies in a Zarr store, wanted one; {_ADVICE}")
        return _of_store(arrays[0].store, arrays[0].path.rpartition("/")[0])
    if isinstance(data, zarr.Group):
        return _of_store(data.store, data.path)
    if isinstance(data, Store):
        return _of_store(data, "")
    raise DataError(
        f"data: got {type(data).__name__}, wanted a path, a URL, a Zarr store or group, or an xarray.Dataset opened "
        "from Zarr"
    )


def require_whole(data: Any, names: list[str]) -> None:
    """Raise DataError unless the named variables of an xarray.Dataset are what lies in its store.

    The rows are read from there: a selection or a decoding of xarray's would silently be left out.
    """
    for name in names:
        if name not in data.variables:
            raise DataError(
                f"xarray.Dataset: got no variable {name!r}, wanted all arrays; pass inputs=... and target=..."
            )
        if backing_array(data.variables[name]) is None:
            raise DataError(
                f"xarray.Dataset: variable {name!r} is a selection, decoded or computed, wanted what lies in the "
                f"store; open it with mask_and_scale=False and select nothing, {_ADVICE}"
            )


def _of_store(store: Store, group: str) -> Source:
    if isinstance(store, LocalStore):
        return Source(str(Path(store.root).absolute()), None, group)
    if isinstance(store, MemoryStore):
        raise DataError(f"data: got a store in the memory of this process, which no worker sees; {_ADVICE}")
    session = getattr(store, "session", None)
    snapshot = getattr(session, "snapshot_id", None)
    if session is not None and snapshot is not None:
        if not session.read_only:
            raise DataError(
                "data: got a writable session, wanted one that is pinned to a snapshot; pass the store of "
                "repository.readonly_session(...)"
            )
        return Source(f"{type(store).__name__}:{snapshot}", store, group, {"snapshot": str(snapshot)})
    if not store.read_only:
        store = store.with_read_only(True)
    try:
        digest = hashlib.sha256(pickle.dumps(store)).hexdigest()[:12]
    except Exception as error:  # whatever a store raises
        raise DataError(
            f"data: {type(store).__name__} cannot be sent to workers ({error}); pass the URL, or a store that can"
        ) from error
    return Source(f"{type(store).__name__}:{digest}", store, group)
