"""Zarr stores and folders opened from a user's path or URL: clouds through obstore, all other URLs through fsspec."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import zarr
import zarr.errors
from zarr.abc.store import RangeByteRequest, Store
from zarr.buffer import default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore, ObjectStore

from dask_isgd.errors import ConfigError, CorruptChunkError, DataError, IsgdError, MissingExtraError
from dask_isgd.redaction import redact_urls
from dask_isgd.storage.backends.clouds import in_cloud, open_cloud
from dask_isgd.storage.backends.folder import Folder
from dask_isgd.storage.backends.local import LocalFolder
from dask_isgd.storage.backends.object_store import ObjectFolder
from dask_isgd.storage.backends.zarr_internals import wait

StorageOptions: TypeAlias = Mapping[str, Any] | None
Array: TypeAlias = "zarr.Array[Any]"


def local_path(url: str | Path) -> Path | None:
    """Return the absolute path that ``url`` denotes on this machine; None for a remote URL."""
    text = str(url)
    if text.startswith("file://") and "::" not in text:
        return Path(unquote(urlsplit(text).path)).absolute()
    if "://" in text or "::" in text:
        return None
    return Path(text).expanduser().absolute()


def normalise(url: str | Path) -> str:
    """Return the normal form of a URL; local paths become absolute, so that all workers open the same."""
    path = local_path(url)
    return str(path) if path is not None else str(url).rstrip("/")


def join(url: str, name: str) -> str:
    """Return the URL of ``name`` below ``url``."""
    return f"{url.rstrip('/')}/{name}"


def redact(url: str | Path) -> str:
    """Return ``url`` without user, password, query and fragment, for messages and reprs."""
    if local_path(url) is not None:
        return str(url)
    return redact_urls(str(url))


def open_store(url: str | Path, *, read_only: bool, storage_options: StorageOptions = None) -> Store:
    """Open a store at ``url``; nothing is created until something is written."""
    path = local_path(url)
    if path is not None:
        return LocalStore(path, read_only=read_only)
    if in_cloud(str(url)):
        return ObjectStore(open_cloud(normalise(url), storage_options or {}), read_only=read_only)
    options = dict(storage_options or {})
    if "::" not in str(url):  # a cached listing hides what other processes have written since
        options = {"use_listings_cache": False, **options}
    try:
        with _redacting():
            return FsspecStore.from_url(str(url), storage_options=options, read_only=read_only)
    except ImportError as error:  # fsspec knows which package
        raise MissingExtraError(f"{redact(url)}: {error}; https:// needs pip install 'dask_isgd[http]'") from error


def open_folder(url: str | Path, storage_options: StorageOptions = None) -> Folder:
    """Open a folder; nothing is created until something is written. Raises ConfigError."""
    path = local_path(url)
    if path is not None:
        return LocalFolder(path)
    text = normalise(url)
    if text != redact(text) or "::" in text or set("*[]") & set(text):
        raise ConfigError(
            f"got {redact(url)} with credentials, a query, a chain or one of '*[]' in it; wanted a path, or a URL such "
            "as s3://bucket/folder. Pass credentials in storage_options or in the environment"
        )
    if not in_cloud(text):
        raise ConfigError(
            f"got {text}; wanted a path, or a folder in an object store with create-only puts: s3://, gs:// or az://"
        )
    return ObjectFolder(text, open_cloud(text, storage_options or {}))


def children(store: Store, folder: str = "") -> list[str]:
    """Return the names directly below ``folder``, sorted.

    Zarr's own listing warns about each file that it does not recognise, such as a temporary file of another writer.
    """

    async def collect() -> list[str]:
        return [name.rstrip("/").rsplit("/", 1)[-1] async for name in store.list_dir(folder)]

    try:
        return sorted({name for name in wait(collect()) if name})
    except FileNotFoundError:
        return []


def consolidate(store: Store, path: str = "") -> None:
    """Consolidate the metadata of a finished group, so that xarray opens it with one read.

    Use it only for groups that get no more arrays. Zarr's warning, that other implementations may not support
    consolidated metadata, is suppressed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(store, path=path)


def has_key(store: Store, key: str) -> bool:
    """Return whether ``key`` exists, by a stat locally, otherwise by one request, for a byte of it if need be."""
    if isinstance(store, LocalStore):
        return bool((store.root / key).is_file())
    with _redacting():
        try:
            return bool(wait(store.exists(key)))
        except NotImplementedError:  # VirtualiZarr's store of references only reads
            return wait(store.get(key, default_buffer_prototype(), RangeByteRequest(0, 1))) is not None


@contextmanager
def _redacting() -> Iterator[None]:
    """Take the secrets out of the URLs that an error of a store names; it keeps its class."""
    try:
        yield
    except OSError as error:
        error.args = tuple(redact_urls(part) if isinstance(part, str) else part for part in error.args)
        for name in ("strerror", "filename"):  # of which the message is made if there are several arguments
            if isinstance(part := getattr(error, name), str):
                setattr(error, name, redact_urls(part))
        raise


@contextmanager
def opening(where: str, advice: str = "restore its zarr.json from a copy or prepare the data again") -> Iterator[None]:
    """Convert any error of metadata that cannot be understood into DataError; ``where`` names what is opened.

    Errors of the library and of the operating system, such as a file that is not there, are not converted.
    """
    try:
        with _redacting():
            yield
    except (IsgdError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, FileNotFoundError)):
            raise
        reason = redact_urls(f"{type(error).__name__}: {error}")
        raise DataError(f"{where}: its metadata are damaged: {reason}; {advice}") from error


@contextmanager
def decoding(where: str, advice: str = "restore the chunk from a copy or prepare the data again") -> Iterator[None]:
    """Convert any error of a codec into CorruptChunkError; errors of the operating system are not converted."""
    try:
        with _redacting():
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
    reason = redact_urls(f"{type(error).__name__}: {error}")
    return CorruptChunkError(f"{where} cannot be decoded: {reason}. Wanted the bytes that were written; {advice}")
