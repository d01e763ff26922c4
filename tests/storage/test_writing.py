"""Promises of write_dataset: opened by xarray as it is, checked before anything is written."""

import numpy as np
import pytest
import xarray
import zarr

from dask_isgd.errors import DataError, EmptyDatasetError, LengthMismatchError
from dask_isgd.storage import Dataset, write_dataset

X = np.arange(60, dtype="f4").reshape(20, 3)
Y = np.arange(20) % 4
GOOD = {"arrays": {"x": X, "y": Y}, "inputs": "x", "target": "y", "chunk_size": 6}


@pytest.mark.parametrize("compressed", [False, True])
def test_xarray_opens_it(tmp_path, compressed):
    for split in ("train", "test"):
        write_dataset(tmp_path / "d", split, **GOOD, classes=4, compressed=compressed)
    for opened in (
        xarray.open_zarr(tmp_path / "d", group="train"),
        xarray.open_zarr(tmp_path / "d" / "test"),
        xarray.open_datatree(tmp_path / "d", engine="zarr")["train"].ds,
    ):
        assert opened.x.dims == ("sample", "x_1")
        np.testing.assert_array_equal(opened.x, X)
        np.testing.assert_array_equal(opened.y, Y)
        assert opened.attrs["isgd"] == {
            "format_version": 1, "inputs": ["x"], "target": "y", "classes": 4, "normalisation": None,
        }  # fmt: skip


def test_uncompressed_chunks_are_the_bytes_and_a_checksum(tmp_path):
    write_dataset(tmp_path, "train", **GOOD)
    array = zarr.open_array(tmp_path / "train" / "x", mode="r")
    assert array.chunks == (6, 3)
    raw = (tmp_path / "train" / "x" / "c" / "1" / "0").read_bytes()
    assert raw[:-4] == X[6:12].tobytes()


def test_the_target_and_others_may_have_any_rank(tmp_path):
    arrays = {"image": np.ones((8, 2, 2, 3), "u1"), "mask": np.ones((8, 2, 2), "?"), "extra": np.ones(8)}
    write_dataset(tmp_path, "train", arrays, inputs=["image"], target="mask", chunk_size=3)
    assert Dataset(tmp_path).chunk(2).target.shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"inputs": "z"}, DataError, "wanted each among them"),
        ({"inputs": []}, DataError, "wanted each among them"),
        ({"inputs": ["x", "y"]}, DataError, "once"),
        ({"arrays": {"x": X, "y": Y[:5]}}, LengthMismatchError, "'x': 20, 'y': 5"),
        ({"arrays": {"x": X[:0], "y": Y[:0]}}, EmptyDatasetError, "no examples"),
        ({"arrays": {"x": X.astype(object), "y": Y}}, DataError, "got object"),
        ({"arrays": {"x": X.astype("S3"), "y": Y}}, DataError, "wanted a numpy array"),
        ({"arrays": {"x": X.tolist(), "y": Y}}, DataError, "got list"),
        ({"chunk_size": 0}, DataError, "at least 1"),
        ({"normalisation": {"y": {"mean": 0, "std": 1}}}, DataError, "'mean' and 'std' of one of"),
        ({"normalisation": {"x": {"mean": 0}}}, DataError, "'mean' and 'std'"),
        ({"normalisation": {"x": {"mean": [0, 0], "std": 1}}}, DataError, "broadcast"),
        ({"normalisation": {"x": {"mean": 0, "std": 0}}}, DataError, "above zero"),
        ({"normalisation": {"x": {"mean": np.nan, "std": 1}}}, DataError, "finite"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        write_dataset(tmp_path / "d", "train", **{**GOOD, **changes})
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("split", ["", "/", "..", "train/", "../other"])
def test_splits_need_a_name(tmp_path, split):
    with pytest.raises(DataError, match="wanted a name"):
        write_dataset(tmp_path / "d", split, **GOOD)


def test_a_split_is_never_overwritten(tmp_path):
    write_dataset(tmp_path, "train", **GOOD)
    with pytest.raises(DataError, match="already has a split 'train'"):
        write_dataset(tmp_path, "train", **GOOD)
    np.testing.assert_array_equal(Dataset(tmp_path).load().target, Y)
