"""The parts of Zarr that are private or differ between its releases, each with its reason.

A canary test (``tests/storage/test_zarr_internals.py``) fails when a release of Zarr moves or changes one.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import zarr
from numcodecs import blosc, zstd
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.metadata import ArrayV2Metadata
from zarr.core.sync import sync

_T = TypeVar("_T")
ByteOrder: TypeAlias = Literal["<", ">", "="]


class PlainBytes(NamedTuple):
    """The layout of the bytes of a chunk, once decompressed."""

    byte_order: ByteOrder
    """``"<"``, ``">"``, or ``"="`` if the dtype itself decides."""
    checksum: bool
    """Whether a CRC-32C of four bytes follows the stored bytes."""
    decompress: Callable[[memoryview], bytes] | None = None
    """What the stored bytes must be passed to; None if they are not compressed."""


def wait(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine of a store on Zarr's own event loop and return its result.

    The public interface of a store is asynchronous only, and a store may be bound to that loop.
    """
    result: _T = sync(coroutine)
    return result


def chunk_key(array: zarr.Array[Any], coordinates: tuple[int, ...]) -> str:
    """The store's key of one chunk, or of one shard if the array is sharded.

    The public interface does not name the file of a chunk.
    """
    key = array.metadata.encode_chunk_key(coordinates)
    return f"{array.path}/{key}" if array.path else key


def has_regular_chunks(array: zarr.Array[Any]) -> bool:
    """Whether all chunks of ``array`` have one shape; since Zarr 3.3 ``chunks`` raises if they differ."""
    try:
        _ = array.chunks
    except NotImplementedError:
        return False
    return True


def backing_array(variable: Any) -> zarr.Array[Any] | None:
    """Return the array that a variable of xarray reads, None if it reads a part of one, changes it, or is in memory.

    xarray's public interface does not tell where a variable lies.
    """
    values = variable._data
    graph = getattr(values, "dask", None)
    if graph is not None:
        layers = list(graph.layers)
        if len(layers) != 2:  # the array and its blocks: what is computed has more
            return None
        values = graph.get(layers[0])
    while not isinstance(values, zarr.Array):
        parts = getattr(getattr(values, "key", None), "tuple", ())
        if hasattr(values, "func") or not all(isinstance(part, slice) and part == slice(None) for part in parts):
            return None
        inside = getattr(values, "array", None)
        values = getattr(values, "_array", None) if inside is None or callable(inside) else inside
        if values is None:
            return None
    return values if values.shape == variable.shape else None


def dimension_names(array: zarr.Array[Any]) -> list[str | None]:
    """Return the names of the dimensions, None if unnamed: of format 3, or of xarray's convention.

    The public interface of an array does not give the names of format 3.
    """
    names: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    return list(names) if names else [None] * array.ndim


def is_consolidated(group: zarr.Group) -> bool:
    """Whether the metadata of all members lies in one place; the public interface of a group does not tell."""
    return group.metadata.consolidated_metadata is not None


def plain_bytes(array: zarr.Array[Any]) -> PlainBytes | None:
    """How the chunks of ``array`` hold their values as bytes in C order, compressed or not; None if in another way.

    The public ``compressors`` and ``filters`` know neither the byte order of format 3 nor the memory order of format 2.
    """
    metadata = array.metadata
    if isinstance(metadata, ArrayV2Metadata):
        # One column in Fortran's order is one in C's.
        plain = not metadata.filters and (metadata.order == "C" or array.ndim == 1)
        compressor = metadata.compressor
        return PlainBytes("=", False, None if compressor is None else compressor.decode) if plain else None
    first, *rest = metadata.codecs
    decompress = None
    if rest and isinstance(rest[0], (ZstdCodec, BloscCodec)):
        decompress = zstd.decompress if isinstance(rest.pop(0), ZstdCodec) else blosc.decompress
    if not isinstance(first, BytesCodec) or len(rest) > 1 or not all(isinstance(c, Crc32cCodec) for c in rest):
        return None
    return PlainBytes(byte_order(first.endian), bool(rest), decompress)


def codec_names(array: zarr.Array[Any]) -> list[str]:
    """Return the names of all codecs that decode a chunk of ``array``, those inside of shards included.

    The public properties leave out the codecs of a shard's index.
    """
    metadata = array.metadata
    if isinstance(metadata, ArrayV2Metadata):
        codecs = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor is not None else [])]
        return [str(codec.codec_id) for codec in codecs]
    return [name for codec in metadata.codecs for name in _names(codec)]


def _names(codec: Any) -> list[str]:
    inside = [*getattr(codec, "codecs", ()), *getattr(codec, "index_codecs", ())]
    name = str(codec.to_dict()["name"]).removeprefix("numcodecs.")
    return [name, *(each for inner in inside for each in _names(inner))]


def byte_order(endian: Any) -> ByteOrder:
    """The byte order of a ``BytesCodec``: its ``endian`` is an enumeration up to Zarr 3.2 and a string since 3.3."""
    name = getattr(endian, "value", endian)
    orders: dict[Any, ByteOrder] = {None: "=", "little": "<", "big": ">"}
    return orders[name]
