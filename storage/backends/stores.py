"""Zarr stores and folders from what a user types: a local path, or any URL that fsspec knows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from dask_isgd.errors import ConfigError, CorruptChunkError
from dask_isgd.storage.backends.folder import Folder
from dask_isgd.storage.backends.local import LocalFolder
from dask_isgd.storage.backends.object_store import ObjectFolder
from dask_isgd.storage.backends.zarr_internals import wait

_A = TypeVar("_A")
_T = TypeVar("_T")
_AT_ONCE = 8

StorageOptions: TypeAlias = Mapping[str, Any] | None
Array: TypeAlias = "zarr.Array[Any]"


def local_path(url: str | Path) -> Path | None:
    """The path a ``url`` means on this machine, absolute; None for a remote one."""
    text = str(url)
    if text.startswith("file://") and "::" not in text:
        return Path(unquote(urlsplit(text).path)).absolute()
    if "://" in text or "::" in text:
        return None
    return Path(text).expanduser().absolute()


def normalise(url: str | Path) -> str:
    """One spelling for a place: local ones absolute, so that workers elsewhere open the same."""
    path = local_path(url)
    return str(path) if path is not None else str(url).rstrip("/")


def join(url: str, name: str) -> str:
    """``name`` below ``url``."""
    return f"{url.rstrip('/')}/{name}"


def redact(url: str | Path) -> str:
    """``url`` without user, password, query and fragment: fit for messages and reprs."""
    if local_path(url) is not None:
        return str(url)
    text = re.sub(r"[?#].*$", "", str(url))
    return re.sub(r"://[^/]*@", "://", text)


def open_store(url: str | Path, *, read_only: bool, storage_options: StorageOptions = None) -> Store:
    """A store over ``url``; nothing is created until something is written."""
    path = local_path(url)
    if path is not None:
        return LocalStore(path, read_only=read_only)
    options = dict(storage_options or {})
    if "::" not in str(url):  # a remembered listing hides what other processes have written since
        options = {"use_listings_cache": False, **options}
    if str(url).startswith("s3"):  # an object in one request: half as many, and never parts of two versions
        options = {"max_concurrency": 1, **options}
    return FsspecStore.from_url(str(url), storage_options=options, read_only=read_only)


def open_folder(url: str | Path, storage_options: StorageOptions = None) -> Folder:
    """A folder to write to; nothing is created until something is written. Raises ConfigError."""
    path = local_path(url)
    if path is not None:
        return LocalFolder(path)
    text = normalise(url)
    if text != redact(text) or "::" in text or set("*[]") & set(text):
        raise ConfigError(
            f"got {redact(url)} with credentials, a query, a chain or one of '*[]' in it; wanted a path, or a URL such "
            "as s3://bucket/folder. Credentials go into storage_options, or into the environment"
        )
    try:
        return ObjectFolder(text, storage_options or {})
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{text} cannot be opened: {error}. Check the URL, and install what its store needs (s3: dask_isgd[s3])"
        ) from error


def children(store: Store, folder: str = "") -> list[str]:
    """Names right below ``folder``, sorted.

    Zarr's own listing warns about every file it doesn't know, such as another writer's temporary.
    """

    async def collect() -> list[str]:
        return [name.rstrip("/").rsplit("/", 1)[-1] async for name in store.list_dir(folder)]

    try:
        return sorted({name for name in wait(collect()) if name})
    except FileNotFoundError:
        return []


def consolidate(store: Store, path: str = "") -> None:
    """Put the metadata of a finished group in one place, so that xarray opens it at once.

    Only for groups that get no more arrays. Zarr warns that other implementations may not know it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(store, path=path)


def for_each(store: Store, function: Callable[[_A], _T], items: Iterable[_A]) -> list[_T]:
    """``function`` of each item, in order; several at once where each has to wait for a remote store."""
    if isinstance(store, LocalStore):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


def has_key(store: Store, key: str) -> bool:
    """Whether ``key`` exists: a stat locally, one request remotely."""
    if isinstance(store, LocalStore):
        return bool((store.root / key).is_file())
    return bool(wait(store.exists(key)))


@contextmanager
def decoding(where: str, advice: str = "restore the chunk from a copy or prepare the data again") -> Iterator[None]:
    """Whatever a codec raises becomes CorruptChunkError; the operating system's errors pass."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise _corrupt(where, advice, error) from error
    except Exception as error:
        raise _corrupt(where, advice, error) from error


def _corrupt(where: str, advice: str, error: Exception) -> CorruptChunkError:
    return CorruptChunkError(
        f"{where} cannot be decoded: {type(error).__name__}: {error}. Wanted the bytes that were written; {advice}"
    )
