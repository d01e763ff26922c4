"""Promises of Dataset: right rows in any order, roles told apart, and no silent fill value."""

import json
import pickle

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_isgd.errors import (
    CorruptChunkError,
    DataError,
    EmptyDatasetError,
    LabelError,
    LengthMismatchError,
    MissingChunkError,
)
from dask_isgd.storage import Dataset, write_dataset
from dask_isgd.storage.data.chunks import Chunks

N, CHUNK = 103, 10
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(N, 4, 3)).astype("f4")
AGE = RNG.integers(0, 90, N).astype("u1")
LABEL = np.repeat(np.arange(10), 11)[:N].astype("i4")


@pytest.fixture(params=["local", "remote"])
def url(request, tmp_path):
    return str(tmp_path / "data.zarr") if request.param == "local" else f"memory://{tmp_path.name}/data.zarr"


def write(url, split="train", **changes):
    settings = {"inputs": ["image", "age"], "target": "label", "chunk_size": CHUNK, "classes": 10}
    write_dataset(url, split, {"image": IMAGE, "age": AGE, "label": LABEL}, **{**settings, **changes})
    return Dataset(url, group=split)


def group_with(path, **arrays):
    """A plain Zarr group without the library's attributes; each array is (shape, chunk, dimension names)."""
    group = zarr.open_group(path, mode="w")
    for name, (shape, chunk, names) in arrays.items():
        array = group.create_array(
            name, shape=shape, chunks=(chunk, *shape[1:]), dtype="f4", dimension_names=names, fill_value=np.nan
        )
        array[...] = np.arange(array.size).reshape(shape) % 5
    return path


class TestReading:
    @pytest.mark.parametrize(
        "indices",
        [
            [],
            [0],
            [102],
            [5, 5, 5],
            range(N),
            range(N - 1, -1, -1),
            [99, 0, 100, 9, 10, 9],
            RNG.integers(0, N, 500),
            np.array([3, 77], "u1"),
        ],
        ids=["none", "first", "last", "repeats", "all", "reversed", "across chunks", "many", "small dtype"],
    )
    def test_rows_are_those_asked_for(self, url, indices):
        got = write(url).rows(indices)
        want = np.asarray(indices, int)
        np.testing.assert_array_equal(got.inputs[0], IMAGE[want])
        np.testing.assert_array_equal(got.inputs[1], AGE[want])
        np.testing.assert_array_equal(got.target, LABEL[want])
        assert [a.dtype for a in (*got.inputs, got.target)] == ["f4", "u1", "i4"]

    @settings(max_examples=50, deadline=None)
    @given(indices=st.lists(st.integers(0, N - 1)))
    def test_any_indices(self, tmp_path_factory, indices):
        path = tmp_path_factory.getbasetemp() / "any.zarr"
        data = Dataset(path) if path.exists() else write(path)
        np.testing.assert_array_equal(data.rows(np.array(indices, int)).inputs[0], IMAGE[np.array(indices, int)])

    @pytest.mark.parametrize("indices", [[-1], [N], [0.5], [[1, 2]], [True], ["a"]])
    def test_other_indices_are_refused(self, tmp_path, indices):
        with pytest.raises(IndexError, match="wanted"):
            write(tmp_path / "d").rows(indices)

    def test_each_chunk_is_read_once(self, tmp_path, monkeypatch):
        data, reads = write(tmp_path / "d"), []
        read = Chunks._decode
        monkeypatch.setattr(Chunks, "_decode", lambda self, *where: reads.append(where[1]) or read(self, *where))
        data.rows([1, 55, 2, 51, 1, 102])
        assert sorted(reads) == sorted([0, 50, 100] * 3)

    @pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (5, 25), (100, N), (0, N)])
    def test_slices(self, url, start, stop):
        got = write(url).read(start, stop)
        np.testing.assert_array_equal(got.inputs[0], IMAGE[start:stop])
        assert got.inputs[0].flags.c_contiguous

    def test_chunks_cover_everything_once(self, url):
        data = write(url)
        assert (len(data), data.chunk_size, data.n_chunks) == (N, CHUNK, 11)
        assert data.nbytes == IMAGE.nbytes + AGE.nbytes + LABEL.nbytes
        np.testing.assert_array_equal(np.concatenate([data.chunk(i).target for i in range(11)]), LABEL)
        np.testing.assert_array_equal(data.load().target, LABEL)

    @pytest.mark.parametrize(
        "call", [lambda d: d.chunk(11), lambda d: d.chunk(-1), lambda d: d.read(0, N + 1), lambda d: d.read(5, 4)]
    )
    def test_off_the_grid(self, tmp_path, call):
        with pytest.raises(IndexError, match="wanted"):
            call(write(tmp_path / "d"))

    def test_sharded_and_chunked_along_other_axes(self, tmp_path):
        group = zarr.open_group(tmp_path, mode="w")
        x = group.create_array("x", shape=(50, 6), chunks=(5, 3), shards=(20, 6), dtype="f4")
        y = group.create_array("y", shape=(50,), chunks=(5,), dtype="i8", config={"write_empty_chunks": True})
        x[...], y[...] = np.arange(300).reshape(50, 6) + 1, np.arange(50) % 3
        data = Dataset(tmp_path)
        assert data.chunk_size == 5
        np.testing.assert_array_equal(data.rows([49, 0, 21]).inputs[0], x[...][[49, 0, 21]])
        (tmp_path / "x" / "c" / "1" / "0").unlink()
        with pytest.raises(MissingChunkError, match="chunk 1"):
            data.read(0, 50)


COMPRESSORS = {
    "none": None,
    "zstd": zarr.codecs.ZstdCodec(level=3),
    "blosc": zarr.codecs.BloscCodec(),
    "gzip": zarr.codecs.GzipCodec(),
    "checksum": (zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()),
}


class TestChunksOfOneArray:
    def store(self, folder, compressors, **options):
        group = zarr.open_group(folder, mode="w", zarr_format=options.pop("zarr_format", 3))
        for name, values in (("x", IMAGE.astype(options.get("dtype", "f4"))), ("y", LABEL + 1)):
            chunks = (CHUNK, *values.shape[1:])
            made = group.create_array(
                name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=compressors
            )
            made[...] = values
        return Dataset(folder)

    @pytest.mark.parametrize("compressors", COMPRESSORS.values(), ids=COMPRESSORS)
    @pytest.mark.parametrize("dtype", ["f4", ">i2"])
    def test_they_are_those_that_zarr_reads(self, tmp_path, compressors, dtype):
        data = self.store(tmp_path, compressors, dtype=dtype)
        for chunk in range(data.n_chunks):
            found = data.chunk_of_array("x", chunk)
            np.testing.assert_array_equal(found, data.chunk(chunk).inputs[0])
            assert found.dtype.isnative

    def test_a_former_format(self, tmp_path):
        data = self.store(tmp_path, numcodecs.Blosc(), zarr_format=2)
        np.testing.assert_array_equal(data.chunk_of_array("x", 10), IMAGE[100:])

    def test_zarr_is_not_asked(self, tmp_path, monkeypatch):
        data = self.store(tmp_path, COMPRESSORS["checksum"])
        monkeypatch.setattr(Chunks, "read", None)
        np.testing.assert_array_equal(data.chunk_of_array("x", 1), IMAGE[CHUNK : 2 * CHUNK])

    @pytest.mark.parametrize("compressors", [None, COMPRESSORS["checksum"]])
    def test_what_is_wrong_is_named(self, tmp_path, compressors):
        data = self.store(tmp_path, compressors)
        (tmp_path / "x/c/3/0/0").write_bytes(b"abc")
        (tmp_path / "x/c/4/0/0").unlink()
        with pytest.raises(CorruptChunkError, match="'x', chunk 3") as caught:
            data.chunk_of_array("x", 3)
        assert caught.value.rows == (30, 40)
        with pytest.raises(MissingChunkError, match="'x', chunk 4"):
            data.chunk_of_array("x", 4)
        assert (Dataset(tmp_path, missing="fill").chunk_of_array("x", 4) == 0).all()


class TestRoles:
    """Which array is what: said, then attributes, then names; else an error that names the arrays."""

    ROWS = ((20, 2), 5, ("sample", "x"))
    ONE = ((20,), 5, ("sample",))

    @pytest.mark.parametrize("name", ["target", "label", "y"])
    def test_guessed_by_name(self, tmp_path, name):
        data = Dataset(group_with(tmp_path, b=self.ROWS, a=self.ROWS, mean=((2,), 2, ("x",)), **{name: self.ONE}))
        assert (data.input_names, data.target_name, data.classes) == (("a", "b"), name, None)

    def test_said(self, tmp_path):
        group_with(tmp_path, p=self.ROWS, q=self.ROWS, y=self.ONE, z=self.ONE)
        data = Dataset(tmp_path, inputs="q", target="z")
        assert (data.input_names, data.target_name) == (("q",), "z")
        assert Dataset(tmp_path, inputs=["q", "p"], target="z").input_names == ("q", "p")

    def test_attributes_come_before_names(self, tmp_path):
        arrays = {"a": IMAGE, "y": AGE, "b": LABEL}
        write_dataset(tmp_path, "train", arrays, inputs=["y", "a"], target="b", chunk_size=9)
        data = Dataset(tmp_path)
        assert (data.input_names, data.target_name) == (("y", "a"), "b")

    @pytest.mark.parametrize(
        ("arrays", "options", "error", "says"),
        [
            ({"a": ROWS, "y": ONE, "label": ONE}, {}, DataError, r"'a', 'label', 'y'.*Pass inputs"),
            ({"a": ROWS, "b": ONE}, {}, DataError, r"'a', 'b'.*Pass inputs"),
            ({"y": ONE}, {}, DataError, "no input array"),
            ({"a": ROWS, "y": ONE}, {"inputs": "c"}, DataError, r"no array 'c'.*'a' \(20, 2\)"),
            ({"a": ROWS, "y": ONE}, {"inputs": "y", "target": "y"}, DataError, "each array once"),
            ({"a": ROWS, "y": ((20,), 5, ("time",))}, {"target": "y"}, DataError, "wanted 'sample' first"),
            ({"a": ((21, 2), 5, None), "y": ONE}, {}, LengthMismatchError, "'a': 21, 'y': 20"),
            (
                {"a": ((20, 2), 4, None), "y": ONE},
                {},
                DataError,
                "'a': 4, 'y': 5.*`dask isgd prepare .*--target y`",
            ),
            ({}, {}, EmptyDatasetError, "no arrays"),
            ({"a": ROWS, "y": ONE}, {"group": "train"}, EmptyDatasetError, "no group 'train'"),
        ],
    )
    def test_errors_name_the_arrays(self, tmp_path, arrays, options, error, says):
        group_with(tmp_path, **arrays)
        with pytest.raises(error, match=says):
            Dataset(tmp_path, **options)

    def test_another_dimension(self, tmp_path):
        shape = ((20, 2), 5, ("time", "x"))
        assert len(Dataset(group_with(tmp_path, a=shape, y=((20,), 5, ("time",))), dimension="time")) == 20

    def test_no_such_place(self, url):
        with pytest.raises(EmptyDatasetError, match="no Zarr group"):
            Dataset(url)

    def test_another_format(self, tmp_path):
        group_with(tmp_path, a=self.ROWS, y=self.ONE)
        zarr.open_group(tmp_path).attrs["isgd"] = {"format_version": 99}
        with pytest.raises(DataError, match="format 99, wanted 1"):
            Dataset(tmp_path)

    def test_splits(self, url):
        for split in ("train", "validation"):
            write(url, split)
        assert Dataset(url).split("validation").load().target.shape == (N,)
        assert "validation" in repr(Dataset(url, group="validation"))
        with pytest.raises(EmptyDatasetError, match="'train', 'validation'"):
            Dataset(url).split("test")

    def test_zarr_v2_written_by_xarray(self, tmp_path):
        import xarray

        ds = xarray.Dataset({"x": (("sample", "p"), np.ones((8, 2))), "y": ("sample", np.arange(8) + 1)})
        ds.to_zarr(tmp_path / "v2", zarr_format=2, consolidated=True)
        np.testing.assert_array_equal(Dataset(tmp_path / "v2").rows([7, 0]).target, [8, 1])


class TestBrokenChunks:
    READS = (lambda d: d.chunk(3), lambda d: d.load(), lambda d: d.read(25, 45), lambda d: d.rows([31]))

    @pytest.mark.parametrize("read", READS)
    def test_missing(self, url, read):
        data = write(url)
        store = data._layout.store
        key = "train/image/c/3/0/0"
        if url.startswith("memory"):
            store.fs.sync_fs.rm(f"{store.path}/{key}")
        else:
            (store.root / key).unlink()
        with pytest.raises(MissingChunkError, match=r"image', chunk 3"):
            read(data)
        assert data.chunk(2).target.shape == (CHUNK,)

    @pytest.mark.parametrize("read", READS)
    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
            lambda raw: raw[:-1] + bytes([raw[-1] ^ 128]),
            lambda raw: raw[: len(raw) // 2],
            lambda raw: b"",
            lambda raw: b"abc",
            lambda raw: raw + b"x",
        ],
        ids=["bit", "checksum bit", "half", "empty", "short", "long"],
    )
    def test_corrupt(self, tmp_path, read, compressed, damage):
        data = write(tmp_path / "d", compressed=compressed)
        path = tmp_path / "d/train/image/c/3/0/0"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CorruptChunkError, match=r"image', chunk 3"):
            read(data)

    def test_all_that_can_be_read(self, tmp_path):
        data = write(tmp_path / "d")
        whole = data.load()
        (tmp_path / "d/train/image/c/1/0/0").unlink()
        (tmp_path / "d/train/image/c/3/0/0").write_bytes(b"abc")
        found = []
        rest = data.load(found.append)
        assert [(type(e), e.rows) for e in found] == [
            (MissingChunkError, (CHUNK, 2 * CHUNK)),
            (CorruptChunkError, (3 * CHUNK, 4 * CHUNK)),
        ]
        assert [pickle.loads(pickle.dumps(e)).rows for e in found] == [e.rows for e in found]  # noqa: S301
        kept = [i for i in range(len(data)) if i // CHUNK not in (1, 3)]
        for got, wanted in zip((*rest.inputs, rest.target), (*whole.inputs, whole.target), strict=True):
            np.testing.assert_array_equal(got[kept], wanted[kept])
        np.testing.assert_array_equal(rest.target, whole.target)

    def test_all_zero_chunks_are_not_missing(self, url):
        zeros = {"x": np.zeros((40, 2), "f4"), "y": np.zeros(40, "i8")}
        write_dataset(url, "train", zeros, inputs="x", target="y", chunk_size=7)
        assert not Dataset(url).load().target.any()

    def test_an_operating_system_error_is_not_corruption(self, tmp_path, monkeypatch):
        data = write(tmp_path / "d")

        def fail(*_):
            raise PermissionError(13, "denied")

        monkeypatch.setattr(zarr.Array, "__getitem__", fail)
        with pytest.raises(PermissionError):
            data.chunk(0)


class TestCheck:
    @pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u8", "?"])
    def test_any_integers_are_labels(self, tmp_path, dtype):
        write_dataset(
            tmp_path, "train", {"x": IMAGE, "y": (LABEL % 2).astype(dtype)}, inputs="x", target="y", chunk_size=8
        )
        Dataset(tmp_path).check(2)

    @pytest.mark.parametrize(
        ("bad", "classes", "says"),
        [
            ({57: 10}, 10, r"from 0 to 10, wanted 0 to 9 \(10 classes\).*index 57"),
            ({57: -100, 102: 99}, None, r"from -100 to 99.*index 57"),
            ({0: -1}, 10, "index 0"),
            ({102: 10}, 10, "index 102"),
            ({8: 3, 80: 2}, 2, r"from 0 to 3.*index 8"),
        ],
    )
    def test_labels_out_of_range(self, tmp_path, bad, classes, says):
        labels = np.zeros(N, "i8")
        labels[list(bad)] = list(bad.values())
        write_dataset(tmp_path, "train", {"x": IMAGE, "y": labels}, inputs="x", target="y", chunk_size=8, classes=10)
        with pytest.raises(LabelError, match=says):
            Dataset(tmp_path).check(classes)

    def test_float_targets(self, tmp_path):
        write_dataset(tmp_path, "train", {"x": AGE, "y": IMAGE}, inputs="x", target="y", chunk_size=8)
        Dataset(tmp_path).check()
        with pytest.raises(LabelError, match=r"got float32, wanted integers in \[0, 3\)"):
            Dataset(tmp_path).check(3)

    def test_no_examples(self, tmp_path):
        group = zarr.open_group(tmp_path, mode="w")
        for name in ("x", "y"):
            group.create_array(name, shape=(0,), chunks=(1,), dtype="i4")
        data = Dataset(tmp_path)
        assert (len(data), data.n_chunks, data.rows([]).target.shape, data.load().target.shape) == (0, 0, (0,), (0,))
        with pytest.raises(EmptyDatasetError, match="no examples"):
            data.check()


class TestHandle:
    def test_pickles_small_and_works(self, url):
        data = write(url)
        data.load()
        pickled = pickle.dumps(data)
        assert len(pickled) < 1000
        np.testing.assert_array_equal(pickle.loads(pickled).chunk(1).target, LABEL[10:20])  # noqa: S301

    @pytest.mark.parametrize(
        "normalisation",
        [
            {"image": {"mean": 0.5, "std": 2.0}},
            {"image": {"mean": [[1.0] * 3], "std": np.full((4, 3), 2.0)}, "age": {"mean": 40, "std": 10}},
            None,
        ],
    )
    def test_normalisation(self, url, normalisation):
        got = write(url, normalisation=normalisation).normalisation
        if normalisation is None:
            assert got is None
            return
        assert got.keys() == normalisation.keys()
        for name, entry in normalisation.items():
            for kind, array in zip(("mean", "std"), got[name], strict=True):
                assert array.dtype == np.float32
                np.testing.assert_array_equal(array, np.asarray(entry[kind], "f4"))

    def test_large_normalisation_lies_beside_the_data(self, tmp_path):
        wide, mean = np.ones((20, 100), "f4"), np.arange(100.0)
        write_dataset(
            tmp_path, "train", {"x": wide, "y": LABEL[:20]}, inputs="x", target="y", chunk_size=8,
            normalisation={"x": {"mean": mean, "std": mean + 1}},
        )  # fmt: skip
        data = Dataset(tmp_path)
        assert data.input_names == ("x",)
        np.testing.assert_array_equal(data.normalisation["x"][1], mean + 1)

    def test_fingerprint_tells_data_apart(self, tmp_path):
        def fingerprint(place, **changes):
            arrays = {"image": IMAGE, "age": AGE, "label": LABEL}
            compressed = changes.pop("compressed", False)
            chunk = changes.pop("chunk_size", CHUNK)
            write_dataset(
                tmp_path / place, "train", {**arrays, **changes}, inputs=["image", "age"], target="label",
                chunk_size=chunk, compressed=compressed,
            )  # fmt: skip
            return json.dumps(Dataset(tmp_path / place).fingerprint())

        first, last, other = IMAGE.copy(), IMAGE.copy(), AGE[::-1].copy()
        first[0], last[-1] = 7, 7
        same = [fingerprint("a"), fingerprint("b"), fingerprint("c", compressed=True)]
        different = [
            fingerprint("d", image=first),
            fingerprint("e", image=last),
            fingerprint("f", age=other),
            fingerprint("g", label=LABEL.astype("i8")),
            fingerprint("h", chunk_size=11),
        ]
        assert len(set(same)) == 1
        assert len({*same, *different}) == 6

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("s3://key:secret@bucket/a.zarr", "s3://bucket/a.zarr"),
            ("https://host/a.zarr?sig=secret#secret", "https://host/a.zarr"),
            ("https://u:se@cret@host/a", "https://host/a"),
            ("simplecache::s3://key:secret@bucket/a", "simplecache::s3://bucket/a"),
            ("/data/a.zarr", "/data/a.zarr"),
            ("/data/100%?#.zarr", "/data/100%?#.zarr"),
        ],
    )
    def test_no_secrets_are_shown(self, url, shown):
        from dask_isgd.storage.backends.stores import redact

        assert redact(url) == shown
        assert "secret" not in redact(url)

    def test_storage_options_are_not_shown(self):
        write("memory://hidden/d")
        data = Dataset("memory://hidden/d", storage_options={"secret": "hunter2"})
        assert "hunter2" not in repr(data)
        assert "hunter2" not in str(data.fingerprint())

    def test_file_urls_are_local(self, tmp_path):
        write(tmp_path / "with space")
        assert len(Dataset((tmp_path / "with space").as_uri())) == N
