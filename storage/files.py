"""The few verbs a run directory needs of a file system.

All that checkpoints, leases and run.json know of a disk is here, so that an object store can be
added in one place: there a whole file is a put, an exclusive one a create-only put, and a folder
is published by putting its mark last.

What is half done lives under a name that ends in ``.partial`` (Zarr's local store does the same);
`sweep` removes such leftovers once they are old.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from dask_isgd.errors import StorageFullError

PARTIAL = ".partial"
SWEEP_SECONDS = 60.0
"""Leftovers younger than this may belong to a writer that is still at work."""

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
}
# File systems without hard links say one of these.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn "no room" and "not writable" into StorageFullError naming ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFullError(
            f"cannot write {path}: {_FULL[error.errno]} ({error.strerror}). "
            "What was committed before is intact; make room or mend the permissions, then resume"
        ) from error


def temporary(path: Path) -> Path:
    """A sibling of ``path`` that `sweep` knows as unfinished."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def make_folder(path: Path) -> None:
    """Create ``path`` and its parents, durably: each new folder's parent is synced."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and needs no sync of them
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: Path, data: bytes | memoryview) -> None:
    """Create ``path`` exclusively, write it whole and sync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        rest = memoryview(data)
        while rest:  # a write may be short: 2 GiB at most on Linux, less near a limit
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Write ``path`` whole or not at all; a reader sees the old or the new content."""
    with writing(path):
        make_folder(path.parent)
        partial = temporary(path)
        try:
            _write_new(partial, data)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def create(path: Path, data: bytes) -> bool:
    """Write ``path`` whole unless it exists; False if it does. Of many at once, one wins.

    A hard link takes the name exclusively *and* with its content, where ``O_EXCL`` alone would
    show an empty file first. File systems without links get ``O_EXCL``.
    """
    with writing(path):
        make_folder(path.parent)
        partial = temporary(path)
        try:
            _write_new(partial, data)
            try:
                os.link(partial, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                _write_new(path, data)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)
        return True


def publish(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` appear with all its files at once, durably; the last file is the mark.

    Raises FileExistsError where the folder is there already: it is never overwritten.
    """
    with writing(folder):
        make_folder(folder.parent)
        if folder.exists():
            raise FileExistsError(errno.EEXIST, "the folder exists", str(folder))
        partial = temporary(folder)
        try:
            os.mkdir(partial)
            for name, data in files.items():
                _write_new(partial / name, data)
            sync_folder(partial)
            os.rename(partial, folder)  # onto a folder that is not empty: an error, not an overwrite
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, "the folder exists", str(folder)) from error
            raise
        sync_folder(folder.parent)


def names(folder: Path) -> list[str]:
    """Names in a folder without the unfinished ones, sorted; empty if there is no folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.endswith(PARTIAL))
    except FileNotFoundError:
        return []


def remove_tree(path: Path) -> None:
    """Remove a folder or file; its name goes first, so that no reader meets half of it."""
    partial = temporary(path)
    with writing(path):
        try:
            os.rename(path, partial)
        except FileNotFoundError:
            return
        _remove(partial)


def sweep(folder: Path, *, recursive: bool = False, seconds: float = SWEEP_SECONDS) -> list[Path]:
    """Remove what writers left unfinished for more than ``seconds``; returns the paths removed.

    Age is taken from the file system's own clock, never from this machine's.
    """
    found = sorted(folder.rglob(f"*{PARTIAL}") if recursive else folder.glob(f"*{PARTIAL}"))
    if not found:
        return []
    removed = []
    with writing(folder):
        now = _clock(folder)
        for path in found:
            with contextlib.suppress(FileNotFoundError):  # its writer, or another sweeper, was faster
                if now - _last_change(path) >= seconds:
                    _remove(path)
                    removed.append(path)
    return removed


def _clock(folder: Path) -> float:
    probe = temporary(folder / "clock")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _last_change(path: Path) -> float:
    inside = [entry.stat().st_mtime for entry in path.iterdir()] if path.is_dir() else []
    return max([path.stat().st_mtime, *inside])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
