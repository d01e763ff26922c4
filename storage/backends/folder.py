"""A folder of a run, on a disk or in an object store, with the few operations that a run needs."""

from __future__ import annotations

import contextlib
import errno
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from dask_isgd.errors import StorageFullError

PARTIAL = ".partial"
"""The suffix of unfinished files and folders, as in Zarr's local store."""

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
}


@contextlib.contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Convert errors of full or unwritable storage into StorageFullError, which names ``place``."""
    try:
        yield
    except OSError as error:
        # stores refuse with a PermissionError that has no number
        reason = _FULL.get(errno.EACCES if isinstance(error, PermissionError) else error.errno or 0)
        if reason is None:
            raise
        raise StorageFullError(
            f"cannot write {place}: {reason} ({error.strerror or error}). "
            "Everything committed is intact; free some space or correct the permissions, then resume"
        ) from error


def temporary_name(name: str) -> str:
    """Return a new name beside ``name`` that `Folder.sweep` recognises as unfinished."""
    return f".{name}.{uuid.uuid4().hex}{PARTIAL}"


class Folder(ABC):
    """The storage of checkpoints, leases and the small files of a run.

    A name is relative and may have slashes. Files are always complete: a reader sees all of one or
    none. Reading raises FileNotFoundError; writing raises StorageFullError, and OSError if a
    store does not answer.
    """

    local: ClassVar[bool]
    url: str
    """The URL that opens the folder again; it holds no secret."""
    leftover_age: float
    """Seconds; a younger unfinished file may belong to a writer that is still running."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def place(self, name: str) -> str:
        """Return the URL of ``name``, for messages."""
        return f"{self.url}/{name}"

    @abstractmethod
    def __truediv__(self, name: str) -> Folder:
        """Return a folder below this one; it need not exist."""

    # Reading --------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether there is a file or a folder of that name."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names directly below without the unfinished ones, sorted; empty if there is no folder."""

    @abstractmethod
    def published(self, mark: str) -> list[str]:
        """Return the folders directly below that `publish` has finished with the file ``mark``, sorted."""

    @abstractmethod
    def last_written(self, pattern: str) -> float:
        """Return when the latest file matching ``pattern`` was written, in seconds since 1970; NaN if none matches."""

    # Writing --------------------------------------------------------------------------------

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; False if it does. Of concurrent calls, one succeeds."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Write or replace a file atomically: a reader sees the old or the new content."""

    @abstractmethod
    def publish(self, name: str, files: Mapping[str, bytes]) -> None:
        """Make a folder appear with all its files at once; the last file is the mark.

        Raises FileExistsError if the folder exists: it is never overwritten.
        """

    @abstractmethod
    def withdraw(self, name: str, mark: str) -> None:
        """Remove a published folder; no reader finds it half removed."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content; do nothing if there is none."""

    @abstractmethod
    def remove_empty(self) -> None:
        """Remove this folder itself if it is empty."""

    @abstractmethod
    def sweep(self, seconds: float | None = None, *, mark: str | None = None, recursive: bool = False) -> list[str]:
        """Remove and return what killed writers left unfinished more than ``seconds`` (``leftover_age``) ago.

        ``mark`` is that of the folders published here. Ages are measured by the clock of the file
        system or the store, never by this machine's.
        """

    @abstractmethod
    def require_exclusive(self) -> None:
        """Raise ConfigError if two writers that `create` the same name could both succeed."""
