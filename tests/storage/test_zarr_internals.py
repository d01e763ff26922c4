"""Canaries: what the library uses of Zarr's private parts is still there and means the same."""

from __future__ import annotations

from enum import Enum

import numpy as np
import pytest
import zarr
from numcodecs import Delta, Zstd, blosc, zstd
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from dask_isgd.storage.backends.stores import consolidate
from dask_isgd.storage.backends.zarr_internals import (
    PlainBytes,
    byte_order,
    chunk_key,
    dimension_names,
    has_regular_chunks,
    is_consolidated,
    plain_bytes,
    wait,
)


class Endian(Enum):
    """As in Zarr up to 3.2."""

    little = "little"
    big = "big"


@pytest.mark.parametrize(
    ("endian", "order"), [(Endian.little, "<"), (Endian.big, ">"), ("little", "<"), ("big", ">"), (None, "=")]
)
def test_the_byte_order_is_read_in_both_forms(endian, order):
    assert byte_order(endian) == order


@pytest.mark.parametrize("endian", ["little", "big"])
def test_the_installed_zarr_has_one_of_the_forms(endian):
    assert byte_order(BytesCodec(endian=endian).endian) == {"little": "<", "big": ">"}[endian]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"compressors": None}, PlainBytes("<", False)),
        ({"compressors": None, "serializer": BytesCodec(endian="big")}, PlainBytes(">", False)),
        ({"compressors": (Crc32cCodec(),)}, PlainBytes("<", True)),
        ({"compressors": (Crc32cCodec(), Crc32cCodec())}, None),
        ({"compressors": (ZstdCodec(),)}, PlainBytes("<", False, zstd.decompress)),
        ({"compressors": (BloscCodec(), Crc32cCodec())}, PlainBytes("<", True, blosc.decompress)),
        ({"compressors": (Crc32cCodec(), ZstdCodec())}, None),
        ({"compressors": (GzipCodec(),)}, None),
        ({"compressors": None, "shards": (4,)}, None),
        ({"compressors": None, "zarr_format": 2}, PlainBytes("=", False)),
        ({"compressors": Zstd(), "filters": [Delta("f4")], "zarr_format": 2}, None),
    ],
)
def test_plain_bytes_are_told_from_encoded_ones(tmp_path, options, wanted):
    array = zarr.create_array(tmp_path / "a", shape=(8,), chunks=(2,), dtype="f4", **options)
    assert plain_bytes(array) == wanted


def test_a_compressor_of_the_former_format_decodes_its_chunks(tmp_path):
    array = zarr.create_array(tmp_path / "a", shape=(8,), chunks=(2,), dtype="f4", compressors=Zstd(), zarr_format=2)
    found = plain_bytes(array)
    assert found[:2] == ("=", False)
    assert bytes(found.decompress(Zstd().encode(b"four"))) == b"four"


def test_the_key_of_a_chunk_names_its_file(tmp_path):
    group = zarr.create_group(tmp_path / "g")
    array = group.create_array("a", shape=(4, 2), chunks=(2, 2), dtype="i8")
    array[:] = np.ones((4, 2))
    assert chunk_key(array, (1, 0)) == "a/c/1/0"
    assert (tmp_path / "g" / "a" / "c" / "1" / "0").is_file()


def test_a_coroutine_of_a_store_is_waited_for(tmp_path):
    zarr.create_group(tmp_path / "g")
    assert wait(zarr.storage.LocalStore(tmp_path / "g").exists("zarr.json"))


@pytest.mark.parametrize(
    ("options", "attributes", "wanted"),
    [
        ({"dimension_names": ("sample", "x")}, {}, ["sample", "x"]),
        ({}, {}, [None, None]),
        ({"zarr_format": 2}, {"_ARRAY_DIMENSIONS": ["sample", "x"]}, ["sample", "x"]),
        ({"zarr_format": 2}, {}, [None, None]),
    ],
)
def test_the_names_of_the_dimensions_are_read_in_both_formats(tmp_path, options, attributes, wanted):
    array = zarr.create_array(tmp_path / "a", shape=(4, 2), dtype="f4", attributes=attributes, **options)
    assert dimension_names(array) == wanted


def test_consolidated_metadata_are_recognised(tmp_path):
    zarr.create_group(tmp_path / "g")
    assert not is_consolidated(zarr.open_group(tmp_path / "g", mode="r"))
    consolidate(zarr.storage.LocalStore(tmp_path / "g"))
    assert is_consolidated(zarr.open_group(tmp_path / "g", mode="r"))


def test_a_regular_grid_is_told_from_a_rectilinear_one(tmp_path):
    assert has_regular_chunks(zarr.create_array(tmp_path / "a", shape=(8,), chunks=(3,), dtype="f4"))

    class Rectilinear:
        @property
        def chunks(self):
            raise NotImplementedError("as in Zarr since 3.3")

    assert not has_regular_chunks(Rectilinear())
