"""Promises of WeightArray: whole chunks or none, NaN for never, nothing wrong silently."""

import pickle

import numpy as np
import pytest
import xarray
from processes import start

from dask_isgd.errors import CorruptChunkError, RunNotFoundError
from dask_isgd.storage import WeightArray

N, CHUNK = 1003, 100


@pytest.fixture
def weights(tmp_path):
    return WeightArray.create(tmp_path / "weights.zarr", N, CHUNK)


def test_new_ones_are_never_scored(weights):
    assert (weights.n, weights.chunk_size, weights.n_chunks) == (N, CHUNK, 11)
    assert weights.bounds(10) == (1000, 1003)
    assert np.isnan(weights.read_all()).all()
    assert np.isnan(weights.read_stamps()).all()
    assert weights.read_all().dtype == np.float32


@pytest.mark.parametrize("url", ["local", "memory://weights/w"])
def test_what_is_written_is_read(tmp_path, url):
    url = tmp_path / "w" if url == "local" else url
    weights = WeightArray.create(url, N, CHUNK)
    want = np.full(N, np.nan, "f4")
    for chunk in (3, 10, 0, 3):
        start, stop = weights.bounds(chunk)
        want[start:stop] = np.arange(start, stop) + chunk
        weights.write(chunk, want[start:stop])
    opened = pickle.loads(pickle.dumps(WeightArray.open(url)))  # noqa: S301
    assert (opened.n, opened.chunk_size) == (N, CHUNK)
    np.testing.assert_array_equal(opened.read_all(), want)
    np.testing.assert_array_equal(opened.read(10), want[1000:])
    assert len(pickle.dumps(opened)) < 1000


@pytest.mark.parametrize("n_chunks", [1, 11, 65_536, 65_537, 140_000])
def test_stamps(tmp_path, n_chunks):
    weights = WeightArray.create(tmp_path / "w", n_chunks, 1)
    stamps = np.random.default_rng(0).normal(size=(n_chunks, 3))
    stamps[2::3] = np.nan
    weights.write_stamps(stamps)
    np.testing.assert_array_equal(weights.read_stamps(), stamps)
    files = [path for path in (tmp_path / "w" / "stamp" / "c").rglob("*") if path.is_file()]
    assert len(files) == -(-n_chunks // 65_536)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1", "?"])
def test_real_numbers_are_cast(weights, dtype):
    weights.write(0, np.ones(CHUNK, dtype))
    assert (weights.read(0) == 1).all()


@pytest.mark.parametrize(
    ("chunk", "values", "says"),
    [
        (0, np.ones(99), r"got shape \(99,\), wanted \(100,\)"),
        (10, np.ones(100), r"wanted \(3,\)"),
        (0, np.ones((100, 1)), "got shape"),
        (0, 1.0, "got shape"),
        (0, np.ones(100, complex), "got complex128"),
        (0, np.ones(100, object), "got object"),
        (0, ["1"] * 100, "got <U1"),
        (0, np.full(100, 1e300), "beyond float32"),
        (11, np.ones(100), "chunk 11, wanted 0 to 10"),
        (-1, np.ones(3), "chunk -1"),
    ],
)
def test_refused_before_anything_is_written(weights, tmp_path, chunk, values, says):
    with pytest.raises(ValueError, match=says):
        weights.write(chunk, values)
    assert not (tmp_path / "weights.zarr" / "weight" / "c").exists()


@pytest.mark.parametrize("stamps", [np.ones((10, 3)), np.ones(33), np.ones((11, 3), object)])
def test_stamps_refused(weights, stamps):
    with pytest.raises(ValueError, match="stamps: got"):
        weights.write_stamps(stamps)


def test_infinite_and_missing_weights_are_the_callers_business(weights):
    weights.write(10, [np.inf, np.nan, 1])
    np.testing.assert_array_equal(weights.read(10), np.array([np.inf, np.nan, 1], "f4"))


def test_a_flipped_bit_is_never_a_weight(weights, tmp_path, caplog):
    for chunk in range(11):
        weights.write(chunk, np.ones(np.diff(weights.bounds(chunk))[0]))
    path = tmp_path / "weights.zarr" / "weight" / "c" / "4"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 64
    path.write_bytes(raw)
    with pytest.raises(CorruptChunkError, match="'weight', chunk 4"):
        weights.read(4)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(weights.read_all())), np.arange(400, 500))
    assert "chunk 4" in caplog.text
    weights.write(4, np.ones(CHUNK))
    assert (weights.read_all() == 1).all()


def test_truncated_stamps_count_as_never(weights, tmp_path, caplog):
    weights.write_stamps(np.ones((11, 3)))
    path = tmp_path / "weights.zarr" / "stamp" / "c" / "0" / "0"
    path.write_bytes(path.read_bytes()[:50])
    assert np.isnan(weights.read_stamps()).all()
    assert "'stamp', chunk 0" in caplog.text


def test_xarray_opens_it(weights):
    weights.write(0, np.ones(CHUNK))
    opened = xarray.open_zarr(weights.url)
    assert (opened.weight.dims, opened.stamp.dims) == (("sample",), ("chunk", "field"))
    assert float(opened.weight.sum()) == CHUNK


def test_create_and_open_say_what_is_there(weights, tmp_path):
    with pytest.raises(ValueError, match="exist"):
        WeightArray.create(weights.url, N, CHUNK)
    with pytest.raises(RunNotFoundError, match="no weights at"):
        WeightArray.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="at least 1"):
        WeightArray.create(tmp_path / "zero", 0, 5)


WRITER = """
import sys, numpy as np
from dask_isgd.storage import WeightArray
weights = WeightArray.open(sys.argv[1])
for value in range(1_000_000):
    weights.write(0, np.full(weights.chunk_size, value))
    if value == 0: print("writing", flush=True)
"""


def test_no_reader_sees_half_a_chunk_and_a_kill_leaves_none(tmp_path):
    weights = WeightArray.create(tmp_path / "w", 200_000, 200_000)
    seen = set()
    for _ in range(3):
        writer = start(WRITER, weights.url)
        try:
            assert writer.stdout.readline() == "writing\n", writer.stderr.read()
            for _ in range(60):
                values = np.unique(weights.read(0))
                assert len(values) == 1
                seen.update(values)
        finally:
            writer.kill()
            writer.communicate(timeout=60)
        assert len(np.unique(weights.read(0))) == 1
    assert len(seen) > 3
    weights.sweep(seconds=0)
    assert not list((tmp_path / "w").rglob("*.partial"))


def test_sweep_leaves_writers_at_work_alone(weights, tmp_path):
    leftover = tmp_path / "weights.zarr" / "weight" / "c" / "0.abc.partial"
    leftover.parent.mkdir()
    leftover.touch()
    assert weights.sweep() == []
    assert weights.sweep(seconds=0) == [str(leftover)]
    assert not leftover.exists()
