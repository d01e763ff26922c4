"""Promises of datasets that are elsewhere: an S3 server and a plain web server, with the same errors as a disk."""

from __future__ import annotations

import functools
import http.server
import pickle
import shutil
import threading

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dask_isgd.errors import CorruptChunkError, EmptyDatasetError, MissingChunkError
from dask_isgd.storage import Dataset, write_dataset

N, CHUNK = 103, 10
X, Y = np.random.default_rng(0).normal(size=(N, 3)).astype("f4"), np.arange(N) % 7


def write(url, **options):
    for split in ("train", "test"):
        write_dataset(
            url, split, {"x": X, "y": Y}, inputs="x", target="y", chunk_size=CHUNK, classes=7,
            normalisation={"x": {"mean": 1, "std": 2}}, **options,
        )  # fmt: skip


class S3:
    """A folder in a bucket."""

    def __init__(self, home):
        self.options, self.folder = home.options, home.folder
        self.url = home.url
        write(self.url, storage_options=self.options)

    def remove(self, key):
        self.folder.remove(key)

    def damage(self, key, change):
        self.folder.replace(key, change(self.folder.read(key)))


class Web:
    """A folder behind a web server that lists nothing."""

    def __init__(self, folder, server):
        self.folder = folder / "d.zarr"
        if self.folder.exists():
            shutil.rmtree(self.folder)
        write(self.folder)
        self.options = {}
        self.url = f"http://127.0.0.1:{server.server_port}/d.zarr"

    def remove(self, key):
        (self.folder / key).unlink()

    def damage(self, key, change):
        (self.folder / key).write_bytes(change((self.folder / key).read_bytes()))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def list_directory(self, _):
        self.send_error(404)


@pytest.fixture(scope="module")
def web_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["s3", "http"])
def place(request):
    if request.param == "http":
        return Web(*request.getfixturevalue("web_server"))
    return S3(request.getfixturevalue("s3"))


def test_rows_chunks_and_splits(place):
    data = Dataset(place.url, storage_options=place.options)
    assert (len(data), data.n_chunks, data.classes, data.local, data.raw) == (N, 11, 7, False, None)
    indices = np.array([5, 102, 5, 31])
    assert_array_equal(data.rows(indices).inputs[0], X[indices])
    assert_array_equal(data.load().target, Y)
    assert len(data.split("test")) == N
    assert_array_equal(data.normalisation["x"][1], 2)
    data.check()


def test_it_pickles_and_shows_no_secret(place):
    data = Dataset(place.url, storage_options=place.options)
    again = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert_array_equal(again.chunk(10).target, Y[100:])
    assert "hunter2" not in repr(data) + str(data.fingerprint())


@pytest.mark.parametrize("read", [lambda d: d.chunk(3), lambda d: d.rows([35]), lambda d: d.load()])
@pytest.mark.parametrize("change", [None, lambda raw: raw[:-5], lambda raw: raw[:9] + bytes([raw[9] ^ 1]) + raw[10:]])
def test_missing_and_corrupt_chunks(place, read, change):
    data = Dataset(place.url, storage_options=place.options)
    if change is None:
        place.remove("train/x/c/3/0")
    else:
        place.damage("train/x/c/3/0", change)
    with pytest.raises(MissingChunkError if change is None else CorruptChunkError, match="x', chunk 3"):
        read(data)
    assert_array_equal(data.chunk(2).target, Y[20:30])


def test_nothing_there(place):
    with pytest.raises(EmptyDatasetError, match="no Zarr group"):
        Dataset(place.url + "x", storage_options=place.options)
    with pytest.raises(EmptyDatasetError, match=r"no group 'validation'.*'test', 'train'"):
        Dataset(place.url, group="validation", storage_options=place.options)
