"""Datasets of the pipelines: real files, tiny files of every kind, and errors for bad ones."""

import gzip
import json
import struct
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from scipy.io import savemat

from dask_isgd.errors import DataError, IsgdError, LengthMismatchError
from dask_isgd.pipelines import PIPELINES
from dask_isgd.pipelines.datasets import fashion_mnist, svhn
from dask_isgd.pipelines.datasets.digits import stratified
from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.storage import Dataset, write_dataset
from dask_isgd.storage.data.prepared import prepare as prepare_once

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def idx(array, code=0x08):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder, *, train=40, test=12, packed=True):
    rng = np.random.default_rng(0)
    made = {}
    for prefix, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        made[prefix] = images, labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            name = f"{prefix}-{kind}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return made


def write_svhn(folder, sizes):
    rng = np.random.default_rng(0)
    made = {}
    for split, n in sizes.items():
        images = rng.integers(0, 256, (n, 3, 32, 32)).astype(np.uint8)
        images[:, 0, 0, 0] = 7  # a pixel that never changes
        labels = rng.integers(0, 10, n)
        made[split] = images, labels
        # MATLAB's layout: rows, columns, colours, examples; the digit 0 is class 10.
        stored = {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]}
        savemat(folder / f"{split}_32x32.mat", stored, do_compression=True)
    return made


class TestDigits:
    def test_splits_and_normalisation(self, tmp_path):
        train = Dataset(PIPELINES["digits"].prepare(str(tmp_path / "d.zarr")), group="train")
        test = train.split("test")
        train.check()
        assert (len(train), len(test), train.classes) == (1437 + 1, 359, 10)
        rows = train.load()
        mean, std = train.normalisation["image"]
        pixels = (rows.inputs[0].astype(np.float64) - mean) / std
        assert abs(pixels.mean()) < 1e-6
        assert abs(pixels.std() - 1) < 1e-6
        # Every class has its share, and no example is in both.
        counts = np.bincount(test.load().target) / np.bincount(rows.target)
        assert np.all(np.abs(counts - 0.25) < 0.01)

    def test_no_example_twice(self):
        labels = np.random.default_rng(1).integers(0, 7, 500)
        kept, held = stratified(labels, 0.2, seed=3)
        assert sorted([*kept, *held]) == list(range(500))
        assert np.array_equal(stratified(labels, 0.2, seed=3)[1], held)

    def test_a_source_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="comes with dask_isgd"):
            PIPELINES["digits"].prepare(str(tmp_path / "d.zarr"), source=str(tmp_path))


class TestFashionMnist:
    @pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
    def test_the_real_files(self, tmp_path):
        train = Dataset(PIPELINES["fashion-mnist"].prepare(str(tmp_path / "f.zarr")), group="train")
        test = train.split("test")
        train.check()
        assert (len(train), len(test), train.classes) == (60_000, 10_000, 10)
        assert np.bincount(train.load().target).tolist() == [6000] * 10
        assert np.bincount(test.load().target).tolist() == [1000] * 10
        mean, std = train.normalisation["image"]
        assert (round(float(mean) / 255, 4), round(float(std) / 255, 4)) == (0.2860, 0.3530)

    @pytest.mark.parametrize("packed", [True, False])
    def test_from_a_folder(self, tmp_path, packed):
        made = write_fashion(tmp_path, packed=packed)
        url = fashion_mnist.prepare(str(tmp_path / "f.zarr"), source=str(tmp_path))
        test = Dataset(url, group="test").load()
        assert np.array_equal(test.inputs[0], made["t10k"][0])
        assert np.array_equal(test.target, made["t10k"][1])
        train = Dataset(url, group="train").load()
        order = np.random.default_rng(fashion_mnist.SEED).permutation(40)
        assert np.array_equal(train.inputs[0], made["train"][0][order])
        assert np.array_equal(train.target, made["train"][1][order])
        attributes = zarr.open_group(f"{url}/test", mode="r").attrs["isgd"]
        assert attributes["class_names"] == list(fashion_mnist.CLASSES)
        assert attributes["class_counts"] == np.bincount(made["t10k"][1]).tolist()

    def test_a_complete_dataset_needs_no_files(self, tmp_path):
        write_fashion(tmp_path)
        url = fashion_mnist.prepare(str(tmp_path / "f.zarr"), source=str(tmp_path))
        for file in tmp_path.glob("*.gz"):
            file.unlink()
        assert fashion_mnist.prepare(url, source=str(tmp_path)) == url

    def test_from_the_environment(self, tmp_path, monkeypatch):
        write_fashion(tmp_path)
        monkeypatch.setenv("ISGD_FASHION_MNIST", str(tmp_path))
        assert len(Dataset(fashion_mnist.prepare(str(tmp_path / "f.zarr")), group="train")) == 40

    def test_the_error_for_a_missing_file_gives_advice(self, tmp_path):
        write_fashion(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(DataError, match=r"no t10k-labels-idx1-ubyte\.gz.*apt install dataset-fashion-mnist"):
            fashion_mnist.prepare(str(tmp_path / "f.zarr"), source=str(tmp_path))
        assert not (tmp_path / "f.zarr").exists()

    def test_lengths_that_differ(self, tmp_path):
        write_fashion(tmp_path)
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(39, np.uint8)))
        with pytest.raises(LengthMismatchError, match="40 images and 39 labels"):
            fashion_mnist.prepare(str(tmp_path / "f.zarr"), source=str(tmp_path))

    def test_every_download_has_a_hash_and_https(self):
        for source in (fashion_mnist.SOURCE, svhn.SOURCE):
            assert source.base_url.startswith("https://")
            assert all(len(value) == 64 and int(value, 16) for value in source.files.values())


class TestIdx:
    @pytest.mark.parametrize(("code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4")])
    def test_every_type_in_native_order(self, tmp_path, code, dtype):
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)
        (tmp_path / "a").write_bytes(idx(array.astype(np.dtype(dtype).newbyteorder(">")), code))
        read = read_idx(tmp_path / "a")
        assert np.array_equal(read, array)
        assert read.dtype == np.dtype(dtype)
        assert read.flags.writeable

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "nothing"),
            (b"PK\x03\x04 a zip file", "wanted an IDX file"),
            (b"\0\0\x08\x03\0\0", "wanted a header of 16"),
            (idx(np.zeros(5, np.uint8))[:-1], r"got 12 bytes, wanted 13 for shape \(5,\)"),
            (idx(np.zeros(5, np.uint8)) + b"x", "got more than 13 bytes, wanted 13"),
            (gzip.compress(idx(np.zeros(500, np.uint8)), mtime=0)[:-9], "cannot be read"),
            (gzip.compress(idx(np.zeros(10_000, np.uint8)), mtime=0), "promises 10,000 bytes .* wanted at most 5,000"),
        ],
    )
    def test_bad_files(self, tmp_path, content, message):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_idx(tmp_path / "a", limit=5000)


class TestSvhn:
    SIZES = {"train": 60, "extra": 140, "test": 20}  # noqa: RUF012

    def test_splits_labels_and_statistics(self, tmp_path):
        made = write_svhn(tmp_path, self.SIZES)
        url = svhn.prepare(str(tmp_path / "s.zarr"), source=str(tmp_path))
        train, validation, test = (Dataset(url, group=name) for name in ("train", "validation", "test"))
        assert (len(train), len(validation), len(test)) == (190, 10, 20)
        images = np.concatenate([made["train"][0], made["extra"][0]])
        labels = np.concatenate([made["train"][1], made["extra"][1]])
        order = np.random.default_rng(42).permutation(200)
        assert np.array_equal(validation.load().inputs[0], images[order[:10]])
        assert np.array_equal(validation.load().target, labels[order[:10]])
        assert np.array_equal(train.load().inputs[0], images[order[10:]])
        assert np.array_equal(train.load().target, labels[order[10:]])
        assert np.array_equal(test.load().inputs[0], made["test"][0])
        assert np.array_equal(test.load().target, made["test"][1])
        mean, std = train.normalisation["image"]
        expected = images[order[10:]].astype(np.float64)
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-6)
        deviations = expected.std(0)
        deviations[0, 0, 0] = 1.0
        np.testing.assert_allclose(std, deviations, rtol=1e-6)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["s.zarr", *(f"{n}_32x32.mat" for n in self.SIZES)])

    @pytest.mark.parametrize("rows", [1, 7, 60, 220])
    def test_blocks_of_any_size_and_again_from_the_start(self, tmp_path, rows):
        made = write_svhn(tmp_path, self.SIZES)
        images = np.concatenate([made[split][0] for split in self.SIZES])
        labels = np.concatenate([made[split][1] for split in self.SIZES])
        with svhn.SvhnTable([tmp_path / f"{split}_32x32.mat" for split in self.SIZES]) as table:
            for start, stop in [*table.blocks(rows), (58, 63), (199, 201), (0, 1)]:
                found = table.read(start, stop, ["image", "label"])
                assert np.array_equal(found["image"], images[start:stop])
                assert np.array_equal(found["label"], labels[start:stop])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.full((4, 1), 11, np.uint8)}, "labels 11 to 11"),
            ({"X": np.zeros((28, 28, 3, 4), np.uint8), "y": np.ones((4, 1), np.uint8)}, r"got X uint8\(28, 28, 3, 4\)"),
            ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((3, 1), np.uint8)}, "X of 4 examples, y of 3"),
            ({"y": np.ones((4, 1), np.uint8)}, "no variable 'X'"),
            ({"X": np.zeros((32, 32, 3, 4), np.uint8)}, "no variable 'y'"),
            ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((1, 4), np.uint8)}, r"got y uint8\(1, 4\)"),
            (b"no matlab file at all" * 20, "cannot be read as a MATLAB file"),
        ],
    )
    def test_bad_files(self, tmp_path, content, message):
        write_svhn(tmp_path, self.SIZES)
        file = tmp_path / "extra_32x32.mat"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            savemat(file, content)
        with pytest.raises(DataError, match=message):
            svhn.prepare(str(tmp_path / "s.zarr"), source=str(tmp_path))
        assert not (tmp_path / "s.zarr").exists()


class TestDownload:
    def test_the_error_without_a_network_gives_advice(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        source = svhn.SOURCE.__class__(
            **{**svhn.SOURCE.__dict__, "base_url": "https://127.0.0.1:9", "files": {"a.mat": "0" * 64}}
        )
        with pytest.raises(DataError, match=r"cannot download https://127\.0\.0\.1:9/a\.mat.*--from.*ISGD_SVHN"):
            source.find()


class TestPreparedOnce:
    IDENTITY = {"pipeline": "test", "version": 1}  # noqa: RUF012

    @staticmethod
    def write(work):
        arrays = {"x": np.arange(6.0), "y": np.zeros(6, np.int64)}
        write_dataset(work / "data.zarr", "train", arrays, inputs="x", target="y", chunk_size=2)

    def test_a_complete_dataset_is_used_again(self, tmp_path):
        url = prepare_once(str(tmp_path / "a.zarr"), self.IDENTITY, self.write)
        assert prepare_once(url, self.IDENTITY, lambda _: pytest.fail("written twice")) == url

    def test_something_else_is_never_overwritten(self, tmp_path):
        url = prepare_once(str(tmp_path / "a.zarr"), self.IDENTITY, self.write)
        with pytest.raises(DataError, match=r"'version': 1.*wanted.*'version': 2"):
            prepare_once(url, {**self.IDENTITY, "version": 2}, self.write)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "diary").write_text("dear")
        with pytest.raises(DataError, match="something else"):
            prepare_once(str(tmp_path / "mine"), self.IDENTITY, self.write)
        assert (tmp_path / "mine" / "diary").read_text() == "dear"

    def test_a_failure_leaves_nothing(self, tmp_path):
        def write(work):
            self.write(work)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare_once(str(tmp_path / "a.zarr"), self.IDENTITY, write)
        assert list(tmp_path.iterdir()) == []

    def test_two_at_once_agree(self, tmp_path):
        url = str(tmp_path / "a.zarr")

        def write(work):
            self.write(work)
            if not (tmp_path / "a.zarr").exists():
                prepare_once(url, self.IDENTITY, self.write)  # another process is faster

        assert prepare_once(url, self.IDENTITY, write) == url
        assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]

    def test_on_another_file_system_the_metadata_come_last(self, monkeypatch):
        fs = fsspec.filesystem("memory")
        seen = []
        put = type(fs).put_file
        monkeypatch.setattr(
            type(fs), "put_file", lambda self, a, b, *r, **k: (seen.append(b), put(self, a, b, *r, **k))
        )
        url = prepare_once("memory://prepared/a.zarr", self.IDENTITY, self.write)
        assert seen[-1].endswith("a.zarr/zarr.json")
        first = next(i for i, name in enumerate(seen) if name.endswith("zarr.json"))
        assert all(name.endswith("zarr.json") for name in seen[first:])
        assert json.loads(fs.cat_file(seen[-1]))["attributes"]["prepared"] == self.IDENTITY
        assert Dataset(url, group="train").load().inputs[0].tolist() == [0, 1, 2, 3, 4, 5]
        assert prepare_once(url, self.IDENTITY, lambda _: pytest.fail("written twice")) == url

    def test_in_a_bucket_with_the_credentials_of_the_environment(self, s3, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.options["endpoint_url"])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.options["key"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.options["secret"])
        url = prepare_once(f"{s3.url}/a.zarr", self.IDENTITY, self.write)
        assert Dataset(url, group="train").load().inputs[0].tolist() == [0, 1, 2, 3, 4, 5]
        assert prepare_once(url, self.IDENTITY, lambda _: pytest.fail("written twice")) == url
        with pytest.raises(DataError, match=r"holds .*'test'.*, wanted"):
            prepare_once(url, {"name": "b"}, lambda _: pytest.fail("overwritten"))

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises((IsgdError, OSError)):
            prepare_once(str(tmp_path / "file" / "a.zarr"), self.IDENTITY, self.write)
