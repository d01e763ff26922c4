"""Folders on a file system: each file is written under a temporary name, synced, then renamed or linked.

Unfinished files have names that end in ``.partial``; `sweep` removes them once they are old.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dask_isgd.errors import ConfigError
from dask_isgd.storage.backends.folder import PARTIAL, Folder, temporary_name, writing

# File systems without hard links report one of these.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalFolder(Folder):
    """A folder that is a path. Everything it writes is durable: file contents and names are synced."""

    local = True
    leftover_age = 60.0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def __truediv__(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path) if not name.endswith(PARTIAL))
        except FileNotFoundError:
            return []

    def published(self, mark: str) -> list[str]:
        return self.names()  # each was renamed into place with all its files

    def last_written(self, pattern: str) -> float:
        return max((path.stat().st_mtime for path in self.path.glob(pattern)), default=math.nan)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; return False if it does.

        A hard link creates the name exclusively *and* with its content, whereas ``O_EXCL`` alone would
        show an empty file first. ``O_EXCL`` serves file systems without links.
        """
        path = self.path / name
        with _whole(path, data) as partial:
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:
                    _write_new(path, data)
                except FileExistsError:
                    return False
            return True

    def replace(self, name: str, data: bytes) -> None:
        path = self.path / name
        with _whole(path, data) as partial:
            os.replace(partial, path)

    def publish(self, name: str, files: Mapping[str, bytes]) -> None:
        folder = self.path / name
        with writing(folder):
            _make_folder(folder.parent)
            if folder.exists():
                raise FileExistsError(errno.EEXIST, "the folder exists", str(folder))
            partial = temporary(folder)
            try:
                os.mkdir(partial)
                for file, data in files.items():
                    _write_new(partial / file, data)
                _sync_folder(partial)
                os.rename(partial, folder)  # fails if the target is a folder that is not empty: nothing is overwritten
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                if error.errno == errno.ENOTEMPTY:
                    raise FileExistsError(errno.EEXIST, "the folder exists", str(folder)) from error
                raise
            _sync_folder(folder.parent)

    def withdraw(self, name: str, mark: str) -> None:
        self.remove(name)

    def remove(self, name: str) -> None:
        path = self.path / name
        partial = temporary(path)
        with writing(path):
            try:
                os.rename(path, partial)  # the name disappears first, so that no reader finds half of it
            except FileNotFoundError:
                return
            _remove(partial)

    def remove_empty(self) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def sweep(self, seconds: float | None = None, *, mark: str | None = None, recursive: bool = False) -> list[str]:
        seconds = self.leftover_age if seconds is None else seconds
        found = sorted(self.path.rglob(f"*{PARTIAL}") if recursive else self.path.glob(f"*{PARTIAL}"))
        if not found:
            return []
        removed = []
        with writing(self.path):
            now = _clock(self.path)
            for path in found:
                with contextlib.suppress(FileNotFoundError):  # its writer, or another sweep, was faster
                    if now - _last_change(path) >= seconds:
                        _remove(path)
                        removed.append(str(path))
        return removed

    def require_exclusive(self) -> None:
        """Raise ConfigError if nothing can be created here; links and O_EXCL are exclusive on any file system."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
        try:
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
            probe = temporary(there / "probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"run directory {self.url}: nothing can be created there: {error.strerror or error}. "
                "Choose another directory, or check its permissions"
            ) from error


def temporary(path: Path) -> Path:
    """Return a sibling of ``path`` that `sweep` recognises as unfinished."""
    return path.with_name(temporary_name(path.name))


@contextlib.contextmanager
def _whole(path: Path, data: bytes) -> Iterator[Path]:
    """Write ``data`` under a temporary name beside ``path``; once the caller has renamed it, sync the folder."""
    with writing(path):
        _make_folder(path.parent)
        partial = temporary(path)
        try:
            _write_new(partial, data)
            yield partial
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _make_folder(path: Path) -> None:
    """Create ``path`` and its parents durably: the parent of each new folder is synced."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Sync a folder, so that the names in it are durable."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders, and needs no sync of them
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: Path, data: bytes | memoryview) -> None:
    """Create ``path`` exclusively, write all of ``data`` and sync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        rest = memoryview(data)
        while rest:  # a write may be short: Linux writes 2 GiB at most, and less near a limit
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
