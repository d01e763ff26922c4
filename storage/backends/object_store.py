"""Folders in an object store, accessed through obstore: each file is a single put.

A put is atomic in such stores, and its object can be listed and read immediately (on Amazon S3 since
2020). There is no rename: the mark of a published folder is put last, create-only, and a folder without
its mark counts as absent. An exclusive file is a create-only put (``If-None-Match: *`` on S3).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fnmatch
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from dask_isgd import config
from dask_isgd.errors import ConfigError, StorageFullError
from dask_isgd.storage.backends.clouds import reason
from dask_isgd.storage.backends.folder import PARTIAL, Folder, temporary_name, writing
from dask_isgd.storage.backends.zarr_internals import wait

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
_LEAST_RATE = 1 << 20
"""Bytes per second: a large put may take this much longer than a small one."""
_PAUSE = 0.2
_NO_REPLY = "HTTP error"


class ObjectFolder(Folder):
    """A folder that is a prefix in a bucket; ``store`` is obstore's, of ``url`` or of the folder ``prefix`` above.

    ``isgd.storage.timeout`` limits each request together with its retries. obstore repeats what may be repeated;
    a create-only put is repeated here, because only its caller knows what it means to find the object then.
    """

    local = False

    def __init__(self, url: str, store: ObjectStore, prefix: str = "") -> None:
        self.url = url
        self._store, self._prefix = store, prefix
        self._timeout = config.seconds("storage.timeout")
        # Many times longer than a published folder may lack its mark while its writer is alive.
        self.leftover_age = max(600.0, 5 * self._timeout)

    def __truediv__(self, name: str) -> ObjectFolder:
        return ObjectFolder(self.place(name), self._store, f"{self._prefix}{name}/")

    # Reading --------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        import obstore

        async def content() -> bytes:
            found = await obstore.get_async(self._store, self._key(name))
            return bytes(await found.bytes_async())

        return self._answer(content)

    def exists(self, name: str) -> bool:
        import obstore

        with contextlib.suppress(FileNotFoundError):
            if name:
                self._answer(lambda: obstore.head_async(self._store, self._key(name)))
                return True
        found = self._listed(name)
        return bool(found["objects"] or found["common_prefixes"])

    def names(self) -> list[str]:
        found = self._listed("")
        paths = [*(entry["path"] for entry in found["objects"]), *found["common_prefixes"]]
        names = {path.rstrip("/").rpartition("/")[2] for path in paths}
        return sorted(name for name in names if name and not name.endswith(PARTIAL))

    def published(self, mark: str) -> list[str]:
        files = (name.split("/") for name in self._files())
        return sorted(parts[0] for parts in files if len(parts) == 2 and parts[1] == mark)

    def last_written(self, pattern: str) -> float:
        below = pattern.partition("*")[0].rpartition("/")[0]
        files = (self / below)._files() if below else self._files()
        pattern = pattern.removeprefix(f"{below}/")
        times = (when.timestamp() for name, when in files.items() if fnmatch.fnmatchcase(name, pattern))
        return max(times, default=math.nan)

    # Writing --------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists; return False if it does.

        A retry may find the object of an earlier attempt that seemed lost. It returns False then, although
        this writer created the object. A store may refuse both of two writers at once (S3's 409); then there is
        no object, and the put is repeated.
        """
        from obstore.exceptions import AlreadyExistsError

        with writing(self.place(name)):
            for seconds, last in self._attempts(len(data)):
                try:
                    self._put(name, data, create=True, seconds=seconds)
                    return True
                except AlreadyExistsError as error:
                    if self.exists(name):
                        return False
                    if last:
                        raise OSError(errno.EBUSY, reason(error), self.url) from error
                except ConnectionError:
                    if last:
                        raise
        raise AssertionError("the last attempt returns or raises")

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
        self._delete([f"{name}/{mark}"])
        self.remove(name)

    def remove(self, name: str) -> None:
        with writing(self.place(name)):
            self._delete([f"{name}/{file}" for file in (self / name)._files()])
            self._delete([name])

    def remove_empty(self) -> None:
        pass  # a prefix exists only as long as there is an object below it

    def sweep(self, seconds: float | None = None, *, mark: str | None = None, recursive: bool = False) -> list[str]:
        if mark is None:
            return []  # a put leaves nothing unfinished
        seconds = self.leftover_age if seconds is None else seconds
        changed: dict[str, float] = {}
        done = set()
        for name, when in self._files().items():
            folder, _, file = name.partition("/")
            changed[folder] = max(changed.get(folder, -math.inf), when.timestamp())
            if file == mark or not (file or folder.endswith(PARTIAL)):
                done.add(folder)
        left = sorted(set(changed) - done)
        if not left:
            return []
        now = self._clock()
        old = [folder for folder in left if now - changed[folder] >= seconds]
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
                self._delete([probe])
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
        return f"{self._prefix}{name}"

    def _files(self) -> dict[str, datetime]:
        """Return all files below by their names relative to this folder, and when the store wrote them."""
        import obstore

        found = self._answer(lambda: obstore.list(self._store, self._prefix or None).collect_async())
        return {entry["path"].removeprefix(self._prefix): entry["last_modified"] for entry in found}

    def _listed(self, name: str) -> Any:
        """Return what lies directly below a folder: its objects and the common prefixes of those further below."""
        import obstore

        return self._answer(lambda: obstore.list_with_delimiter_async(self._store, self._key(name) or None))

    def _put(self, name: str, data: bytes, *, create: bool = False, seconds: float | None = None) -> None:
        import obstore

        def put() -> Awaitable[Any]:
            if create:  # in one request: of several parts it is not exclusive in every store
                return obstore.put_async(self._store, self._key(name), data, mode="create", use_multipart=False)
            return obstore.put_async(self._store, self._key(name), data)

        self._answer(put, len(data) / _LEAST_RATE + self._timeout if seconds is None else seconds)

    def _delete(self, names: list[str]) -> None:
        import obstore

        paths = [self._key(name) for name in names]
        with contextlib.suppress(FileNotFoundError):
            if paths:
                self._answer(lambda: obstore.delete_async(self._store, paths))

    def _clock(self) -> float:
        """Return the time of the store's own clock."""
        import obstore

        probe = temporary_name("clock")
        self._put(probe, b"")
        try:
            when: datetime = self._answer(lambda: obstore.head_async(self._store, self._key(probe)))["last_modified"]
            return when.timestamp()
        finally:
            self._delete([probe])

    def _attempts(self, size: int) -> Iterator[tuple[float, bool]]:
        """Yield, after longer and longer pauses, the seconds that are left and whether it is the last attempt."""
        deadline, pause, last = time.monotonic() + self._timeout + size / _LEAST_RATE, _PAUSE, False
        while not last:
            left = deadline - time.monotonic()
            last = left <= 2 * pause
            yield max(left, pause), last
            time.sleep(pause)
            pause *= 2

    def _answer(self, request: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """Wait for a request of obstore; its errors become those of the operating system, which Python names."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

        async def limited() -> T:
            return await asyncio.wait_for(request(), self._timeout if seconds is None else seconds)

        try:
            return wait(limited())
        except AlreadyExistsError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, reason(error), self.url) from error
        except TimeoutError as error:
            message = f"no response within {self._timeout:g} s (isgd.storage.timeout)"
            raise TimeoutError(errno.ETIMEDOUT, message, self.url) from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(errno.EACCES, reason(error), self.url) from error
        except BaseError as error:  # one type whether the store refuses or cannot be reached
            kind = ConnectionError if _NO_REPLY in reason(error) else OSError
            raise kind(errno.EIO, reason(error), self.url) from error
