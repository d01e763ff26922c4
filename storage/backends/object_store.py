"""Folders in an object store, accessed through fsspec: each file is a single put.

A put is atomic in such stores, and its object can be listed and read immediately (on Amazon S3 since
2020). There is no rename: the mark of a published folder is put last, create-only, and a folder without
its mark counts as absent. An exclusive file is a create-only put (``If-None-Match: *`` on S3).
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import math
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import fsspec
import fsspec.asyn

from dask_isgd import config
from dask_isgd.errors import ConfigError, StorageFullError
from dask_isgd.storage.backends.folder import PARTIAL, Folder, temporary_name, writing

_LEAST_RATE = 1 << 20
"""Bytes per second: a large put may take this much longer than a small one."""
_PAUSE, _MAX_PAUSE = 0.2, 5.0
_TRANSIENT = {errno.EIO, errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO)}
_EXISTS = {"PreconditionFailed", "412"}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
# The keys under which S3, Azure, Google and fsspec's memory store keep the time of the last write.
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")


class ObjectFolder(Folder):
    """A folder that is a prefix in a bucket. ``storage_options`` are passed to fsspec and never shown.

    ``isgd.storage.timeout`` limits each request together with its retries: transient errors (no response,
    "slow down") are retried.
    """

    local = False

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.url = url
        self._options = dict(storage_options)
        # Other processes write here too, so listings are never cached.
        self._fs, self._path = fsspec.url_to_fs(url, **{**self._options, "use_listings_cache": False})
        self._timeout = config.seconds("storage.timeout")
        # Many times longer than a published folder may lack its mark while its writer is alive.
        self.leftover_age = max(600.0, 5 * self._timeout)

    def __truediv__(self, name: str) -> ObjectFolder:
        return ObjectFolder(self.place(name), self._options)

    # Reading --------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        return bytes(self._request("cat_file", self._key(name)))

    def exists(self, name: str) -> bool:
        return bool(self._request("exists", self._key(name)))

    def names(self) -> list[str]:
        try:
            found = self._request("ls", self._path, detail=False)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in found if path.rstrip("/") != self._path}
        return sorted(name for name in names if name and not name.endswith(PARTIAL))

    def published(self, mark: str) -> list[str]:
        files = (name.split("/") for name in self._files())
        return sorted(parts[0] for parts in files if len(parts) == 2 and parts[1] == mark)

    def last_written(self, pattern: str) -> float:
        below = pattern.partition("*")[0].rpartition("/")[0]
        files = (self / below)._files() if below else self._files()
        pattern = pattern.removeprefix(f"{below}/")
        times = [_time(info) for name, info in files.items() if fnmatch.fnmatchcase(name, pattern)]
        return max((seconds for seconds in times if not math.isnan(seconds)), default=math.nan)

    # Writing --------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists; return False if it does.

        A retry may find the object of an earlier attempt that seemed lost. It returns False then, although
        this writer created the object.
        """
        with writing(self.place(name)):
            try:
                self._put(name, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _code(error) in _EXISTS:
                    return False
                raise
            return True

    def replace(self, name: str, data: bytes) -> None:
        with writing(self.place(name)):
            self._put(name, data)

    def publish(self, name: str, files: Mapping[str, bytes]) -> None:
        *rest, mark = files
        last = f"{name}/{mark}"
        with writing(self.place(name)):
            if self.exists(last):
                raise FileExistsError(errno.EEXIST, "the folder exists", self.place(name))
            for file in rest:  # without a mark, existing files are leftovers of a failed attempt
                self._put(f"{name}/{file}", files[file])
            if not self.create(last, files[mark]) and self.read(last) != files[mark]:
                raise FileExistsError(errno.EEXIST, "the folder exists", self.place(name))

    def withdraw(self, name: str, mark: str) -> None:
        self._delete(f"{name}/{mark}")
        self.remove(name)

    def remove(self, name: str) -> None:
        with writing(self.place(name)), contextlib.suppress(FileNotFoundError):
            self._request("rm", self._key(name), recursive=True)

    def remove_empty(self) -> None:
        pass  # a prefix exists only as long as there is an object below it

    def sweep(self, seconds: float | None = None, *, mark: str | None = None, recursive: bool = False) -> list[str]:
        if mark is None:
            return []  # a put leaves nothing unfinished
        seconds = self.leftover_age if seconds is None else seconds
        changed: dict[str, float] = {}
        done = set()
        for name, info in self._files().items():
            folder, _, file = name.partition("/")
            changed[folder] = max(changed.get(folder, -math.inf), _time(info))
            if file == mark or not (file or folder.endswith(PARTIAL)):
                done.add(folder)
        left = sorted(set(changed) - done)
        if not left:
            return []
        now = self._clock()
        old = [folder for folder in left if now - changed[folder] >= seconds]  # NaN, an unknown time, is never old
        for folder in old:
            self.remove(folder)
        return [self.place(folder) for folder in old]

    def require_exclusive(self) -> None:
        probe = temporary_name("probe")
        try:
            try:
                exclusive = (
                    self.create(probe, b"first") and not self.create(probe, b"second") and self.read(probe) == b"first"
                )
            finally:
                self._delete(probe)
        except (OSError, StorageFullError) as error:
            raise ConfigError(
                f"run directory {self.url}: a test object cannot be written: {error}. Check the bucket, its region or "
                "endpoint, and the credentials in storage_options or in the environment of this process and all workers"
            ) from error
        if not exclusive:
            raise ConfigError(
                f"run directory {self.url}: if two writers create the same object, the store lets both win. "
                "Wanted create-only puts (S3's If-None-Match: *), without which two learners could hold one run; "
                "use a store that supports them, such as Amazon S3, or a shared file system"
            )

    # Requests -------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _files(self) -> dict[str, Any]:
        """Return all files below by their names relative to this folder, with the store's information on each."""
        try:
            found = self._request("find", self._path, detail=True)
        except FileNotFoundError:
            return {}
        start = f"{self._path}/"
        return {path.removeprefix(start): info for path, info in found.items() if path.startswith(start)}

    def _put(self, name: str, data: bytes, mode: str = "overwrite") -> None:
        self._request("pipe_file", self._key(name), data, mode=mode, seconds=len(data) / _LEAST_RATE)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._request("rm_file", self._key(name))

    def _clock(self) -> float:
        """Return the time of the store's own clock."""
        probe = temporary_name("clock")
        self._put(probe, b"")
        try:
            return _time(self._request("info", self._key(probe)))
        finally:
            self._delete(probe)

    def _request(self, verb: str, *args: Any, seconds: float = 0.0, **kwargs: Any) -> Any:
        deadline = time.monotonic() + self._timeout + seconds
        pause = _PAUSE
        while True:
            try:
                return self._request_once(verb, deadline - time.monotonic(), *args, **kwargs)
            except (FileNotFoundError, FileExistsError, PermissionError):
                raise
            except OSError as error:
                lost = isinstance(error, ConnectionError | TimeoutError)
                if (
                    not (lost or error.errno in _TRANSIENT or _code(error) in _CONFLICT)
                    or time.monotonic() + pause >= deadline
                ):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    def _request_once(self, verb: str, seconds: float, *args: Any, **kwargs: Any) -> Any:
        try:
            if not self._fs.async_impl:
                return getattr(self._fs, verb)(*args, **kwargs)
            request = getattr(self._fs, f"_{verb}")
            return fsspec.asyn.sync(self._fs.loop, request, *args, timeout=max(seconds, _PAUSE), **kwargs)
        except TimeoutError as error:
            message = f"no response within {self._timeout:g} s (isgd.storage.timeout)"
            raise TimeoutError(errno.ETIMEDOUT, message, self.url) from error
        except OSError:
            raise
        except Exception as error:  # a client's own type: a lost connection is transient, missing credentials are not
            kind = type(error).__name__
            number = errno.EIO if "Connect" in kind or "Timeout" in kind else errno.EINVAL
            raise OSError(number, f"{kind}: {error}", self.url) from error


def _code(error: OSError) -> str:
    """Return S3's code for an error; empty for other stores."""
    answer = getattr(error.__cause__, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, Mapping) else ""


def _time(info: Mapping[str, Any]) -> float:
    """When an object was written, by the store's clock, seconds since 1970; NaN if unknown."""
    for key in _TIMES:
        value = info.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return math.nan
