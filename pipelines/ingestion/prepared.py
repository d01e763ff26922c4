"""Datasets that are written whole or not at all, and only once."""

from __future__ import annotations

import errno
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

from dask_isgd.errors import DataError, StorageFullError
from dask_isgd.storage.backends.stores import local_path, redact

_MARK = "prepared"
_STALE_SECONDS = 24 * 3600


def prepare(url: str | Path, identity: Mapping[str, Any], write: Callable[[str], None]) -> str:
    """Have ``write(path)`` make a dataset, and put it at ``url`` in one move.

    ``identity`` (plain JSON: name, version, choices) is kept in the root attributes. A dataset that
    is there already with the same identity is used as it is; anything else at ``url`` is an error,
    never overwritten. On a local disk a sibling folder is renamed; elsewhere the metadata are
    uploaded last, the root's at the very end: a half-written dataset never opens.
    """
    if finished(url, identity):
        return str(url)
    here = local_path(url)
    if here is not None:
        _beside(here, identity, write)
    else:
        with tempfile.TemporaryDirectory(prefix="isgd-") as folder:
            made = Path(folder) / "data.zarr"
            write(str(made))
            place(made, url, identity)
    return str(url)


def finished(url: str | Path, identity: Mapping[str, Any]) -> bool:
    """Whether the dataset with this identity is at ``url``; DataError where something else is.

    A remote place without metadata at its root is one where an upload was cut short: it is done again.
    """
    here = local_path(url)
    fs, path = fsspec.core.url_to_fs(str(here or url))
    root = f"{path.rstrip('/')}/zarr.json"
    if not fs.exists(path if here is not None else root):
        return False
    try:
        found = json.loads(fs.cat_file(root))["attributes"].get(_MARK)
    except (OSError, ValueError, KeyError, AttributeError):
        found = None
    if found != json.loads(json.dumps(identity)):
        raise DataError(
            f"{redact(url)}: holds {_short(found) if found else 'something else'}, wanted {_short(identity)}; "
            "delete it, or prepare somewhere else (--to)"
        )
    return True


def place(made: Path, url: str | Path, identity: Mapping[str, Any]) -> None:
    """Mark the dataset in the local folder ``made`` as whole, and put it at ``url``: renamed, or uploaded."""
    zarr.open_group(str(made), mode="a").attrs[_MARK] = dict(identity)
    here = local_path(url)
    if here is None:
        fs, path = fsspec.core.url_to_fs(str(url))
        _upload(made, fs, path)
        return
    try:
        os.rename(made, here)
    except OSError:
        if not here.exists() or not finished(url, identity):  # unless someone else was faster
            raise


def _short(identity: Mapping[str, Any]) -> str:
    text = str(dict(identity))
    return text if len(text) <= 400 else f"{text[:400]}…"


def _beside(path: Path, identity: Mapping[str, Any], write: Callable[[str], None]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        write(str(temporary))
        place(temporary, path, identity)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageFullError(
                f"{path}: cannot be written ({error.strerror}); free some room or prepare somewhere else (--to)"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path, name: str, *, keep: Path | None = None) -> None:
    """Remove what a killed process left behind a day ago or more."""
    for left in folder.glob(f".{name}.*.partial"):
        if left != keep and time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _upload(made: Path, fs: Any, path: str) -> None:
    files = [file for file in made.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file.name == "zarr.json", -len(file.parts)))
    for file in files:
        target = f"{path.rstrip('/')}/{file.relative_to(made).as_posix()}"
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(file), target)
