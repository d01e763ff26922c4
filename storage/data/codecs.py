"""The codecs with which arrays may be decoded: a codec such as ``pickle`` runs code that a dataset brings along.

Numcodecs decodes whatever the metadata of an array names, and its ``pickle`` filter executes what it decodes.
So arrays are checked before the first chunk is read; arrays that nobody reads are never decoded.
"""

from __future__ import annotations

from typing import Any

import zarr

from dask_isgd.errors import DataError
from dask_isgd.storage.backends.stores import Array, StorageOptions, open_store, redact
from dask_isgd.storage.backends.zarr_internals import codec_names

_ZARR = ("bytes", "transpose", "sharding_indexed", "blosc", "crc32c", "gzip", "zstd")
_NUMCODECS = (
    *("adler32", "astype", "bitround", "bz2", "crc32", "delta", "fixedscaleoffset", "fletcher32"),
    *("jenkins_lookup3", "lz4", "lzma", "packbits", "pcodec", "quantize", "shuffle", "zfpy", "zlib"),
)
NUMERIC = frozenset((*_ZARR, *_NUMCODECS))
"""Codecs of numbers, in formats 2 and 3."""
TEXT = frozenset(("vlen-utf8", "vlen-bytes", "string", "categorize"))
"""Further codecs of arrays of strings."""


def require_numeric(array: Array, where: str) -> None:
    """Raise DataError unless the array holds numbers or booleans that decoding can't turn into code."""
    if array.dtype.kind not in "biufc":
        raise DataError(
            f"{where}: array {array.path!r} holds {array.dtype}, wanted booleans, integers or floats. "
            "Convert it with dask_isgd.pipelines.ingest"
        )
    require_codecs(array, where, NUMERIC)


def require_safe_group(url: str, group: str | None = None, storage_options: StorageOptions = None) -> None:
    """Raise DataError if an array of a group, which another library is going to open, is encoded with other codecs.

    Opening a group with xarray already decodes its coordinates.
    """
    store = open_store(url, read_only=True, storage_options=storage_options)
    members: Any = zarr.open_group(store, path=group or "", mode="r").arrays()
    for _, array in members:
        require_codecs(array, redact(url))


def require_codecs(array: Array, where: str, allowed: frozenset[str] = NUMERIC | TEXT) -> None:
    """Raise DataError if the array is encoded with a codec that isn't ``allowed``."""
    refused = [name for name in codec_names(array) if name not in allowed]
    if refused:
        raise DataError(
            f"{where}: array {array.path!r} is encoded with {', '.join(map(repr, refused))}, wanted only codecs that "
            f"run no code of the dataset: {', '.join(sorted(allowed))}. Write the array again with one of them"
        )
