"""Promises of the feed: the right rows whatever the way, unbiased, within its budget, and it says which way."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from feed_oracle import Explicit, uniform
from numpy.testing import assert_allclose, assert_array_equal

from dask_isgd.config import Learning
from dask_isgd.core.batch import Prepare
from dask_isgd.errors import CorruptChunkError, MissingChunkError, StorageFullError, WaitTimeoutError
from dask_isgd.learner.feed import Feed, open_feed, open_source
from dask_isgd.learner.feed.chunk_files import ChunkFiles
from dask_isgd.learner.feed.in_memory import InMemory
from dask_isgd.learner.feed.local_copy import LocalCopy
from dask_isgd.learner.feed.lookahead import Lookahead
from dask_isgd.storage import Dataset, write_dataset

N, CHUNK = 203, 16
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(N, 5, 4)).astype("f4")
AGE = RNG.integers(0, 200, N).astype("u1")
LABEL = np.arange(N)


def write(url, **options):
    arrays = {"image": IMAGE, "age": AGE, "label": LABEL}
    write_dataset(url, "train", arrays, inputs=["image", "age"], target="label", chunk_size=CHUNK, **options)
    return Dataset(url)


def learning(memory, disk=0, **changes):
    return Learning(steps=10, cache_memory=memory, cache_disk=disk, **{"batch_size": 8, **changes})


def opened(data, draws, memory, disk=0, **options):
    return open_source(data, draws, learning(memory, disk, batch_size=draws.batch), timeout=30, **options)


WAYS = [
    # compressed, memory, disk, the way
    (False, 10**6, 0, InMemory, "in memory"),
    (True, 10**6, 0, InMemory, "in memory"),
    (False, 1000, 0, ChunkFiles, "local uncompressed chunks"),
    (True, 1000, 10**6, LocalCopy, "uncompressed copy of compressed data"),
    (
        True,
        16_000,
        0,
        Lookahead,
        "drawn up to 3 steps ahead, about [0-9.]+ decoded per row drawn, from the compressed",
    ),
    (True, 1000, 0, Lookahead, "drawn up to 0 steps ahead, about [0-9.]+ decoded per row drawn"),
]


class Forgiving(Explicit):
    """Goes on without what cannot be read."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.left_out = set()

    def unreadable(self, error):
        self.left_out.add(error.rows)
        self.q[slice(*error.rows)] = 0
        self.q /= self.q.sum()


class TestEveryWay:
    @pytest.mark.parametrize(("compressed", "memory", "disk", "kind", "says"), WAYS)
    def test_gives_the_rows_it_drew_and_says_why(self, tmp_path, compressed, memory, disk, kind, says):
        data = write(tmp_path / "d", compressed=compressed)
        source = opened(data, uniform(N, batch=32), memory, disk, folder=str(tmp_path))
        assert type(source) is kind
        assert re.search(says, source.reason)
        for step in range(40):
            draw, rows = source.minibatch(step, 100)
            assert_array_equal(rows.target, LABEL[draw.indices])
            assert_array_equal(rows.inputs[0], IMAGE[draw.indices])
            assert_array_equal(rows.inputs[1], AGE[draw.indices])
            assert [a.dtype for a in (*rows.inputs, rows.target)] == ["f4", "u1", "i8"]
            assert_allclose(draw.coefficients * draw.probabilities * N, 1)
        source.close()

    @pytest.mark.parametrize(("compressed", "memory", "disk", "kind", "says"), WAYS)
    def test_goes_on_without_what_cannot_be_read(self, tmp_path, compressed, memory, disk, kind, says):
        data = write(tmp_path / "d", compressed=compressed)
        (tmp_path / "d/train/image/c/3/0/0").write_bytes(b"abc")
        (tmp_path / "d/train/age/c/5").unlink()
        draws = Forgiving(np.ones(N), batch=32)
        source = opened(data, draws, memory, disk, folder=str(tmp_path))
        assert type(source) is kind
        for step in range(60):
            draw, rows = source.minibatch(step, 100)
            assert not {3, 5} & set(draw.indices // CHUNK)
            assert_array_equal(rows.target, LABEL[draw.indices])
            assert_array_equal(rows.inputs[0], IMAGE[draw.indices])
            assert_array_equal(rows.inputs[1], AGE[draw.indices])
        assert draws.left_out == {(3 * CHUNK, 4 * CHUNK), (5 * CHUNK, 6 * CHUNK)}
        source.close()

    def test_remote_data_are_copied(self, tmp_path):
        data = write(f"memory://{tmp_path.name}/d")
        source = opened(data, uniform(N), 1000, 10**6, folder=str(tmp_path))
        assert "copy of remote data" in source.reason
        assert source.wait(60)
        source.close()

    def test_a_synchronous_run_draws_nothing_ahead(self, tmp_path):
        data, draws = write(tmp_path / "d", compressed=True), uniform(N)
        settings = learning(16_000, synchronous=True)
        feed = open_feed(data, draws, Prepare(data, torch.device("cpu")), settings, timeout=10)
        for step in range(3):
            feed(step, 10)
        assert draws.drawn == [0, 1, 2]
        assert "isgd-feed" not in {thread.name for thread in threading.enumerate()}
        feed.close()

    def test_a_slow_way_is_a_warning(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            opened(write(tmp_path / "d", compressed=True), uniform(N), 1000).close()
        assert "slow: allow more memory or disk" in caplog.text

    @pytest.mark.parametrize("kind", [ChunkFiles, LocalCopy])
    def test_batches_larger_than_the_data(self, tmp_path, kind):
        data = write(tmp_path / "d", compressed=kind is LocalCopy)
        source = opened(data, uniform(N, batch=1000), 1000, 10**6, folder=str(tmp_path))
        assert isinstance(source, kind)
        draw, rows = source.minibatch(0, 1)
        assert_array_equal(rows.target, draw.indices)
        source.close()


class TestChunkFiles:
    @pytest.mark.parametrize("zarr_format", [2, 3])
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("dtype", ["f4", "f2", "i2", "u1", "f8", "i8", "?"])
    def test_byte_orders_and_formats(self, tmp_path, zarr_format, order, dtype):
        values = (np.arange(5 * 3).reshape(5, 3) % 100).astype(dtype)
        group = zarr.open_group(tmp_path, mode="w", zarr_format=zarr_format)
        more = {}
        if zarr_format == 3:
            more = {"serializer": zarr.codecs.BytesCodec(endian="little" if order == "<" else "big")}
        for name, array in (("x", values), ("y", values[:, 0].copy())):
            stored = np.dtype(dtype).newbyteorder(order)
            made = group.create_array(
                name, shape=array.shape, chunks=(2, *array.shape[1:]), dtype=stored, compressors=None, filters=None,
                config={"write_empty_chunks": True}, **more,
            )  # fmt: skip
            made[...] = array
        data = Dataset(tmp_path)
        source = ChunkFiles(data, data.raw, uniform(5, batch=20), "", memory=0)
        draw, rows = source.minibatch(0, 1)
        assert_array_equal(rows.inputs[0], values[draw.indices])
        assert rows.inputs[0].dtype == np.dtype(dtype)
        assert rows.inputs[0].dtype.isnative
        assert data.read(0, 5).inputs[0].dtype.isnative

    @pytest.mark.parametrize(
        ("options", "shape"),
        [
            ({"compressors": "auto"}, (8, 4)),
            ({"chunks": (2, 2)}, (8, 4)),
            ({"shards": (4, 4)}, (8, 4)),
            ({"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]}, (8, 4)),
        ],
        ids=["compressed", "split rows", "sharded", "transposed"],
    )
    def test_what_is_not_plain_rows_is_not_taken_for_them(self, tmp_path, options, shape):
        group = zarr.open_group(tmp_path, mode="w")
        settings = {"chunks": (2, 4), "compressors": None, **options}
        group.create_array("x", shape=shape, dtype="f4", **settings)[...] = 1
        group.create_array("y", shape=shape[:1], chunks=(2,), dtype="i8", compressors=None)[...] = 1
        assert Dataset(tmp_path).raw is None

    @pytest.mark.parametrize(
        ("damage", "error"),
        [
            (lambda path: path.unlink(), MissingChunkError),
            (lambda path: path.write_bytes(path.read_bytes()[:-7]), CorruptChunkError),
            (lambda path: path.write_bytes(b"\x01" + path.read_bytes()[1:]), CorruptChunkError),
        ],
        ids=["missing", "short", "a flipped bit"],
    )
    def test_bad_chunks_are_met_at_their_first_row(self, tmp_path, damage, error):
        data = write(tmp_path / "d")
        damage(tmp_path / "d/train/image/c/3/0/0")
        source = ChunkFiles(data, data.raw, uniform(N), "", memory=0)
        source.gather(np.array([0, 1, 40]))
        with pytest.raises(error, match="image', chunk 3"):
            source.gather(np.array([2, 3 * CHUNK]))
        source.close()

    def test_few_files_are_held_open(self, tmp_path, monkeypatch):
        import resource

        monkeypatch.setattr(resource, "getrlimit", lambda _: (12, 12))
        data = write(tmp_path / "d")
        source = ChunkFiles(data, data.raw, uniform(N), "", memory=0)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            source.gather(np.arange(N))
        assert len(os.listdir("/proc/self/fd")) <= before + 6
        source.close()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_chunks_left_out_by_their_writer(self, tmp_path):
        values = np.zeros((40, 3), "f4")
        values[10:20] = 7
        group = zarr.open_group(tmp_path, mode="w")
        for name, array in (("x", values), ("y", values[:, 0].copy())):
            chunks = (10, *array.shape[1:])
            group.create_array(name, shape=array.shape, chunks=chunks, dtype="f4", compressors=None)[...] = array
        with pytest.raises(MissingChunkError, match="missing='fill'"):
            Dataset(tmp_path).load()
        data = Dataset(tmp_path, missing="fill")
        assert_array_equal(data.load().inputs[0], values)
        source = ChunkFiles(data, data.raw, uniform(40), "", memory=0)
        assert_array_equal(source.gather(np.arange(40)).inputs[0], values)
        source.close()


class TestLocalCopy:
    def test_it_is_complete_after_a_while_and_leaves_nothing_behind(self, tmp_path):
        folder = tmp_path / "local"
        folder.mkdir()
        source = LocalCopy(write(tmp_path / "d", compressed=True), uniform(N), "", folder=str(folder), memory=1000)
        assert os.listdir(folder) == []  # no name: gone with the process, however it ends
        assert source.wait(60)
        assert_array_equal(source.gather(np.arange(N)).target, LABEL)
        source.close()

    def test_a_bad_chunk_is_an_error_of_the_draw_that_wants_it(self, tmp_path):
        data = write(tmp_path / "d", compressed=True)
        path = tmp_path / "d/train/age/c/2"
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        source = LocalCopy(data, uniform(N), "", folder=None, memory=1000)
        assert not source.wait(60)
        source.gather(np.arange(CHUNK))
        for _ in range(2):
            with pytest.raises(CorruptChunkError, match="age', chunk 2"):
                source.gather(np.array([2 * CHUNK]))
        path.write_bytes(good)
        assert_array_equal(source.gather(np.arange(N)).inputs[1], AGE)
        source.close()

    def test_no_room_is_rows_drawn_ahead(self, tmp_path, monkeypatch):

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        data = write(tmp_path / "d", compressed=True)
        with pytest.raises(StorageFullError, match="no space is left"):
            LocalCopy(data, uniform(N), "", folder=None, memory=1000)
        source = opened(data, uniform(N), 16_000, 10**6)
        assert isinstance(source, Lookahead)
        assert "no space is left" in source.reason
        source.close()


def supplier(minibatch, close):
    return SimpleNamespace(
        reason="", in_memory=False, chunks_read=0, minibatch=minibatch, interrupt=lambda: None, close=close
    )


class TestFeed:
    def feed(self, tmp_path, *, ahead, source=None, **options):
        data = write(tmp_path / "d")
        source = source or opened(data, uniform(N, batch=16), 1000)
        return Feed(source, Prepare(data, torch.device("cpu")), ahead=ahead, **{"timeout": 30, **options})

    @pytest.mark.parametrize("ahead", [0, 1, 2, 5])
    def test_minibatches_in_order_with_their_own_coefficients(self, tmp_path, ahead):
        feed = self.feed(tmp_path, ahead=ahead)
        draws = uniform(N, batch=16)
        for step in range(3, 20):
            batch = feed(step, 20)
            assert batch.step == step
            assert_array_equal(batch.draw.indices, draws.draw(step).indices)
            assert_array_equal(batch.targets, LABEL[batch.draw.indices])
            assert batch.inputs[0].dtype == torch.float32
        feed.close()

    def test_nothing_is_drawn_beyond_until(self, tmp_path):
        steps = []
        inner = opened(write(tmp_path / "e"), uniform(N), 1000)

        def minibatch(step, until):
            steps.append(step)
            return inner.minibatch(step, until)

        source = supplier(minibatch, inner.close)
        feed = self.feed(tmp_path, ahead=3, source=source)
        for step in range(4):
            feed(step, 4)
        assert steps == [0, 1, 2, 3]
        feed(4, 6)
        feed(5, 6)
        assert steps == list(range(6))
        feed.close()

    def test_an_error_is_raised_at_its_step_and_not_before(self, tmp_path):
        inner = opened(write(tmp_path / "e"), uniform(N), 1000)

        def minibatch(step, until):
            if step == 3:
                raise CorruptChunkError("chunk 7")
            return inner.minibatch(step, until)

        source = supplier(minibatch, inner.close)
        feed = self.feed(tmp_path, ahead=2, source=source)
        for step in range(3):
            feed(step, 10)
        with pytest.raises(CorruptChunkError, match="chunk 7"):
            feed(3, 10)
        feed.close()

    def test_a_store_that_hangs_is_a_timeout(self, tmp_path):
        hold = threading.Event()
        source = supplier(lambda step, until: hold.wait(), lambda: None)
        feed = self.feed(tmp_path, ahead=1, source=source, timeout=0.05)
        with pytest.raises(WaitTimeoutError, match="step 0: no minibatch within"):
            feed(0, 2)
        hold.set()


MEASURE = """
import json, re, sys
import numpy as np
sys.path[:0] = json.loads(sys.argv[1])
from feed_oracle import uniform
from dask_isgd.config import Learning
from dask_isgd.learner.feed import open_source
from dask_isgd.storage import Dataset

data = Dataset(sys.argv[2])
for chunk in range(4):
    data.chunk(chunk)
# Not ru_maxrss: a child inherits its parent's.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
memory, disk = int(sys.argv[3]), int(sys.argv[4])
settings = Learning(steps=1, batch_size=128, cache_memory=memory, cache_disk=disk)
source = open_source(data, uniform(len(data), batch=128), settings, timeout=60)
for step in range(300):
    source.minibatch(step, 300)
print(json.dumps([type(source).__name__, peak() - before]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """64 MB, compressed and not; random, so that it compresses to itself."""
    folder = tmp_path_factory.mktemp("large")
    image = np.random.default_rng(0).integers(0, 256, (20_000, 3200), dtype=np.uint8)
    for compressed in (False, True):
        write_dataset(
            folder / str(compressed), "train", {"x": image, "y": np.zeros(20_000, "i8")}, inputs="x", target="y",
            chunk_size=128, compressed=compressed,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("compressed", "memory", "disk", "kind"),
    [
        (False, 6 << 20, 0, "ChunkFiles"),
        (True, 6 << 20, 1 << 30, "LocalCopy"),
        (True, 6 << 20, 0, "Lookahead"),
        (True, 80 << 20, 0, "InMemory"),
    ],
)
def test_the_memory_budget_holds(large, compressed, memory, disk, kind):
    """The peak of a process of its own, above what it needed to open the data and read a few chunks."""
    command = [
        sys.executable,
        "-c",
        MEASURE,
        json.dumps(sys.path),
        str(large / str(compressed)),
        str(memory),
        str(disk),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    got, peak = json.loads(result.stdout)
    print(f"{kind}: {peak / 2**20:.1f} MiB above the start, {memory / 2**20:.0f} allowed")
    assert got == kind
    assert peak < memory + (12 << 20)
