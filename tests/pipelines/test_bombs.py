"""Small files that promise much are refused before anything of that size is allocated."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from PIL import Image

from dask_isgd.errors import DataError
from dask_isgd.pipelines import ingest
from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.pipelines.ingestion.tables import frame_files

_LIMIT = 30 << 20


def rows(folder):
    group = zarr.open_group(folder / "s", mode="w")
    group.create_array("x", shape=(1 << 42,), chunks=(1 << 20,), dtype="f4")
    group.create_array("y", shape=(1 << 42,), chunks=(1 << 20,), dtype="i8")
    return {"zarr": str(folder / "s")}


def wide(folder):
    group = zarr.open_group(folder / "s", mode="w")
    group.create_array("x", shape=(10, 1 << 40), chunks=(1, 1 << 20), dtype="f4")
    group.create_array("y", shape=(10,), chunks=(1,), dtype="i8")
    return {"zarr": str(folder / "s")}


def png(folder):
    """A valid header of 60,000 × 60,000 pixels, with a handful of bytes behind it."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = part(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    body = part(b"IDAT", zlib.compress(bytes(100)))
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "images" / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + part(b"IEND", b""))
    return {"images": str(folder / "images")}


def large_image(folder):
    (folder / "images" / "a").mkdir(parents=True)
    Image.new("1", (9_000, 9_000)).save(folder / "images" / "a" / "0.png")  # 81 million pixels in 10 kB
    return {"images": str(folder / "images"), "size": [8, 8]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (rows, r"4,398,046,511,104 rows, whose numbers take 100\.00 TiB"),
        (wide, r"rows of 4\.00 TiB, of which 4 must fit into 244\.14 MiB"),
        (png, "cannot be read as an image|pixels, wanted at most"),
        (large_image, r"9000×9000 pixels, wanted at most 67,108,864"),
    ],
)
def test_sources(tmp_path, make, message):
    source = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            ingest(source, tmp_path / "d")
        assert tracemalloc.get_traced_memory()[1] < _LIMIT
    finally:
        tracemalloc.stop()


def test_parquet(tmp_path, monkeypatch):
    """A million equal numbers take a few hundred bytes."""
    pytest.importorskip("pyarrow")
    import pandas as pd

    frame = pd.DataFrame({"x": np.zeros(1_000_000), "y": 0})
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    assert (tmp_path / "t.parquet").stat().st_size < 20_000
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=16 << 20))
    monkeypatch.setattr(frame_files, "psutil", memory)
    with pytest.raises(DataError, match=r"row group of 1,000,000 rows that takes 15\.26 MiB, and 16\.00 MiB"):
        ingest(tmp_path / "t.parquet", tmp_path / "d")


def test_chunks_that_cannot_be_held(tmp_path):
    """Zarr allocates a whole chunk for its first row: found by damaged recipes, with the machine's memory gone."""
    source = np.ones((12, 3), "f4"), np.arange(12) % 2
    with pytest.raises(DataError, match=r"chunk_size: got 1,000,000,000,000 rows, 18\.19 TiB a chunk, of which 2"):
        ingest(source, tmp_path / "d", chunk_size=10**12)


def test_idx(tmp_path):
    (tmp_path / "a").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1 << 20, 1 << 10, 1 << 10))
    with pytest.raises(DataError, match="promises 1,099,511,627,776 bytes"):
        read_idx(tmp_path / "a")
