"""Promises of the chunk reader: the same batches however they are read, one read ahead, kept within a budget."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dask_isgd.errors import CorruptChunkError
from dask_isgd.scorer import chunk_reader as module
from dask_isgd.scorer.chunk_reader import CachedChunkReader
from dask_isgd.storage import Dataset, write_dataset

N, CHUNK = 103, 10
X, Y = np.random.default_rng(0).normal(size=(N, 3)).astype("f4"), np.arange(N)
ROW = X[0].nbytes + Y[0].nbytes


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two chunks a read."""
    monkeypatch.setattr(module, "_READ_BYTES", 2 * CHUNK * ROW)
    write_dataset(tmp_path / "d", "train", {"x": X, "y": Y}, inputs="x", target="y", chunk_size=CHUNK, compressed=True)
    return Dataset(tmp_path / "d")


@pytest.fixture
def reads(monkeypatch):
    """Spans read, in order."""
    found, read = [], Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, a, b: found.append((a, b)) or read(self, a, b))
    return found


@pytest.mark.parametrize("memory", [0, 10**6])
@pytest.mark.parametrize(("start", "stop"), [(0, N), (0, 1), (20, 60), (100, N), (7, 41), (5, 5)])
@pytest.mark.parametrize("batch", [1, 7, 10, 20, 64, 1000])
def test_batches_are_the_slices_of_one_read(data, memory, start, stop, batch):
    reader = CachedChunkReader(memory)
    for _ in range(2):
        got = list(reader.batches(data, start, stop, batch))
        ends = [(a, min(a + batch, stop)) for a in range(start, stop, batch)]
        assert [len(rows.target) for rows in got] == [b - a for a, b in ends]
        for rows, (a, b) in zip(got, ends, strict=True):
            assert_array_equal(rows.inputs[0], X[a:b])
            assert_array_equal(rows.target, Y[a:b])


def test_the_next_read_runs_while_a_batch_is_in_use(data, reads):
    second = threading.Event()
    read = Dataset.read

    def watched(self, a, b):
        if a == 20:
            second.set()
        return read(self, a, b)

    Dataset.read = watched
    try:
        batches = CachedChunkReader(0).batches(data, 0, N, 10)
        next(batches)
        assert second.wait(30)
        assert max(a for a, _ in reads) <= 20  # one ahead, not more
        batches.close()
    finally:
        Dataset.read = read


def test_what_fits_is_read_once_and_what_does_not_is_never_evicted_for_it(data, reads):
    reader = CachedChunkReader(70 * ROW)
    spans = [(0, 30), (30, 60), (60, N)]
    for _ in range(3):
        for a, b in spans:
            list(reader.batches(data, a, b, 10))
    assert reader.nbytes == 60 * ROW
    counts = [sum(a <= first < b for first, _ in reads) for a, b in spans]
    assert counts == [2, 2, 9]  # reads of two chunks: two a span, in one pass; three, in three passes


def test_another_run_takes_the_room_of_the_last(data, reads):
    reader = CachedChunkReader(70 * ROW)
    list(reader.batches(data, 0, 60, 10, tag="a"))
    list(reader.batches(data, 0, 60, 10, tag="b"))
    before = len(reads)
    list(reader.batches(data, 0, 60, 10, tag="b"))
    assert len(reads) == before
    assert reader.nbytes == 60 * ROW


def test_a_bad_chunk_is_named_and_nothing_of_the_span_is_kept(data, tmp_path):
    path = tmp_path / "d/train/x/c/5/0"
    path.write_bytes(path.read_bytes()[:-1])
    reader = CachedChunkReader(10**6)
    batches = reader.batches(data, 0, N, 10)
    for _ in range(4):
        next(batches)
    with pytest.raises(CorruptChunkError, match="x', chunk 5"):
        list(batches)
    assert reader.nbytes == 0
