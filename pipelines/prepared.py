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
from dask_isgd.storage.stores import local_path, redact

_MARK = "prepared"
_STALE_SECONDS = 24 * 3600


def prepare(url: str | Path, identity: Mapping[str, Any], write: Callable[[str], None]) -> str:
    """Have ``write(path)`` make a dataset, and put it at ``url`` in one move.

    ``identity`` (plain JSON: name, version, choices) is kept in the root attributes. A dataset that
    is there already with the same identity is used as it is; anything else at ``url`` is an error,
    never overwritten. On a local disk a sibling folder is renamed; elsewhere the metadata are
    uploaded last, the root's at the very end: a half-written dataset never opens.
    """
    here = local_path(url)
    fs, path = fsspec.core.url_to_fs(str(here or url))
    if fs.exists(path):
        return _reuse(str(url), fs, path, identity)
    if here is not None:
        _beside(here, identity, write)
    else:
        with tempfile.TemporaryDirectory(prefix="isgd-") as folder:
            made = Path(folder) / "data.zarr"
            _make(made, identity, write)
            _upload(made, fs, path)
    return str(url)


def _reuse(url: str, fs: Any, path: str, identity: Mapping[str, Any]) -> str:
    try:
        found = json.loads(fs.cat_file(f"{path.rstrip('/')}/zarr.json"))["attributes"].get(_MARK)
    except (OSError, ValueError, KeyError, AttributeError):
        found = None
    if found != json.loads(json.dumps(identity)):
        raise DataError(
            f"{redact(url)}: holds {found or 'something else'}, wanted {dict(identity)}; "
            "delete it, or prepare somewhere else (--to)"
        )
    return url


def _make(path: Path, identity: Mapping[str, Any], write: Callable[[str], None]) -> None:
    write(str(path))
    zarr.open_group(str(path), mode="a").attrs[_MARK] = dict(identity)


def _beside(path: Path, identity: Mapping[str, Any], write: Callable[[str], None]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        _make(temporary, identity, write)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.exists():
                raise
            _reuse(str(path), fsspec.filesystem("file"), str(path), identity)  # someone else was faster
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageFullError(
                f"{path}: cannot be written ({error.strerror}); free some room or prepare somewhere else (--to)"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what a killed process left behind a day ago or more."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _upload(made: Path, fs: Any, path: str) -> None:
    files = [file for file in made.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file.name == "zarr.json", -len(file.parts)))
    for file in files:
        target = f"{path.rstrip('/')}/{file.relative_to(made).as_posix()}"
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(file), target)
