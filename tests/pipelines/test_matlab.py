"""The MATLAB reader returns the bytes that scipy wrote, a few examples at a time, and refuses bad files."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.io import savemat

from dask_isgd.errors import DataError
from dask_isgd.pipelines.datasets.matlab import open_variable

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5)).astype(np.uint8)


def save(path, *, compressed=True, **more):
    content = {"before": np.arange(7.0), "X": IMAGES.transpose(2, 3, 1, 0), "y": np.ones((50, 1), np.uint8), **more}
    savemat(path, content, do_compression=compressed)
    return path


def examples(variable, rows):
    while len(block := variable.read(rows)):
        yield block


def load(path, rows=7, name="X"):
    with path.open("rb") as file:
        variable = open_variable(file, path, name)
        return None if variable is None else list(examples(variable, rows))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 50, 100])
def test_examples_in_order(tmp_path, compressed, rows):
    blocks = load(save(tmp_path / "a.mat", compressed=compressed), rows)
    assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
    assert_array_equal(np.concatenate(blocks).transpose(0, 1, 3, 2), IMAGES)


def test_no_such_variable(tmp_path):
    assert load(save(tmp_path / "a.mat"), name="Z") is None


def test_another_type(tmp_path):
    with pytest.raises(DataError, match="wanted uint8"):
        load(save(tmp_path / "a.mat"), name="before")


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:300], lambda raw: raw[:-1500], lambda raw: raw[:100], lambda raw: b"", lambda raw: b"abc" * 200],
    ids=["early", "late", "header", "nothing", "something else"],
)
def test_a_bad_file_is_named(tmp_path, compressed, damage):
    path = save(tmp_path / "a.mat", compressed=compressed)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.mat: cannot be read as a MATLAB file"):
        load(path)


def test_flipped_bits(tmp_path):
    path = save(tmp_path / "a.mat")
    raw = bytearray(path.read_bytes())
    raw[1500] ^= 255
    path.write_bytes(raw)
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        load(path)


def test_only_a_few_examples_are_in_memory(tmp_path):
    many = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10_000), dtype=np.uint8)
    path = save(tmp_path / "a.mat", X=many)
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            total = sum(int(block.sum()) for block in examples(open_variable(file, path, "X"), 500))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == int(many.sum(dtype=np.int64))
    assert peak < 12e6  # of 31 MB
