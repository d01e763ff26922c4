"""Datasets that are prepared once, and appear complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import zarr

from dask_isgd.errors import DataError
from dask_isgd.storage.backends.clouds import in_cloud
from dask_isgd.storage.backends.folder import PARTIAL, writing
from dask_isgd.storage.backends.stores import local_path, open_folder, redact

_MARK = "prepared"
_STALE_SECONDS = 24 * 3600


def prepare(
    url: str | Path,
    identity: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    scratch: str | Path | None = None,
    resumable: bool = False,
) -> str:
    """Have ``build(work)`` make the dataset ``work/data.zarr``, move it to ``url`` in one step, and return ``url``.

    ``identity`` (plain JSON: name, version, choices) is kept in the root attributes. A dataset at ``url`` with the
    same identity is used as it is; anything else there is an error and is never overwritten. ``work`` is a folder in
    ``scratch``, by default beside ``url`` or, if that is remote, in the system's temporary folder. If ``resumable``,
    an interrupted ``build`` finds the same folder again; otherwise it is removed. Raises DataError, StorageFullError.
    """
    if finished(url, identity):
        return str(url)
    here = local_path(url)
    name = (here or Path(str(url).rstrip("/").rpartition("/")[2])).name
    parent = Path(scratch) if scratch is not None else here.parent if here is not None else Path(tempfile.gettempdir())
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    work = parent / f".{name}.{digest if resumable else uuid.uuid4().hex}{PARTIAL}"
    complete = False
    try:
        with writing(work):
            parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(parent, name, keep=work)
            build(work)
        with writing(redact(url)):
            _place(work / "data.zarr", url, identity)
        complete = True
    finally:
        if complete or not resumable:
            shutil.rmtree(work, ignore_errors=True)
    return str(url)


def finished(url: str | Path, identity: Mapping[str, Any]) -> bool:
    """Return whether the dataset with this identity is at ``url``. Raises DataError if something else is there.

    A remote place without metadata at its root holds an interrupted upload, which is not finished.
    """
    here = local_path(url)
    place = _Place(here or url)
    if not (here.exists() if here is not None else place.exists("zarr.json")):
        return False
    try:
        found = json.loads(place.read("zarr.json"))["attributes"].get(_MARK)
    except (OSError, ValueError, KeyError, AttributeError):
        found = None
    if found != json.loads(json.dumps(identity)):
        raise DataError(
            f"{redact(url)}: holds {_short(found) if found else 'something else'}, wanted {_short(identity)}; "
            "delete it, or prepare the dataset somewhere else (--to)"
        )
    return True


def _place(made: Path, url: str | Path, identity: Mapping[str, Any]) -> None:
    """Mark the dataset in the local folder ``made`` as complete, and rename or upload it to ``url``.

    An upload ends with the metadata, the root's last, so that an incomplete dataset never opens.
    """
    zarr.open_group(str(made), mode="a").attrs[_MARK] = dict(identity)
    here = local_path(url)
    if here is None:
        _upload(made, _Place(url))
        return
    try:
        os.rename(made, here)
    except OSError:
        if not here.exists() or not finished(url, identity):  # another process may have been faster
            raise


def _short(identity: Mapping[str, Any]) -> str:
    text = str(dict(identity))
    return text if len(text) <= 400 else f"{text[:400]}…"


def _remove_stale(folder: Path, name: str, *, keep: Path) -> None:
    """Remove what killed processes left behind at least a day ago."""
    for left in folder.glob(f".{name}.*{PARTIAL}"):
        if left != keep and time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


class _Place:
    """Where a dataset is put: a folder of a cloud's object store, or whatever fsspec opens."""

    def __init__(self, url: str | Path) -> None:
        self._cloud = open_folder(str(url)) if in_cloud(str(url)) else None
        self._fs: Any = None
        self._path = ""
        if self._cloud is None:
            self._fs, self._path = fsspec.core.url_to_fs(str(url))

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self._at(name)) if self._cloud is None else self._cloud.exists(name))

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(self._at(name)) if self._cloud is None else self._cloud.read(name))

    def put(self, file: Path, name: str) -> None:
        if self._cloud is not None:
            self._cloud.replace(name, file.read_bytes())
            return
        target = self._at(name)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(file), target)

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


def _upload(made: Path, place: _Place) -> None:
    files = [file for file in made.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file.name == "zarr.json", -len(file.parts)))
    for file in files:
        place.put(file, file.relative_to(made).as_posix())
