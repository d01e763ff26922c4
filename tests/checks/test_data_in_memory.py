"""Data in memory are written once beside the run directory; large ones, text and remote runs are refused."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_array_equal

from dask_isgd.checks import data as checked
from dask_isgd.checks.data import dataset_of
from dask_isgd.checks.request import RunRequest, prepare
from dask_isgd.config import Learning
from dask_isgd.errors import DataError
from dask_isgd.storage import Dataset

N = 100
X = np.random.default_rng(0).normal(size=(N, 4))
Y = np.arange(N) % 3


def model():
    return torch.nn.Linear(4, 3)


def test_written_once_in_order_and_shared(tmp_path, caplog):
    first = dataset_of((X, Y), tmp_path / "runs" / "a")
    assert "(100 rows, 2.34 kiB) are written to" in caplog.text
    assert first.normalisation is None
    rows = first.load()
    assert_array_equal(rows.inputs[0], X.astype("f4"))
    assert_array_equal(rows.target, Y)
    caplog.clear()
    assert dataset_of((torch.from_numpy(X), da.from_array(Y)), tmp_path / "runs" / "b").url == first.url
    assert not caplog.text
    assert dataset_of((X, Y[::-1].copy()), tmp_path / "runs" / "c").url != first.url
    assert first.n_chunks == 4


def test_the_numbers_of_a_frame_are_one_input(tmp_path):
    frame = pd.DataFrame(X, columns=[*"abcd"]).assign(target=Y, count=np.arange(N))
    data = dataset_of(frame, tmp_path / "run")
    assert data.input_names == ("features",)
    assert_array_equal(data.load().inputs[0], np.column_stack([X, np.arange(N)]).astype("f4"))


def test_what_is_a_dataset_stays_one(tmp_path):
    data = dataset_of((X, Y), tmp_path / "run")
    assert dataset_of(data, tmp_path / "run") is data
    assert isinstance(dataset_of(data.url, tmp_path / "other"), Dataset)


def test_a_request_takes_data_and_validation(tmp_path):
    request = RunRequest(
        model=model, data=(X, Y), validation=(X[:10], Y[:10]), run_dir=tmp_path / "run", learning=Learning(steps=1)
    )
    spec = prepare(request).spec
    assert (len(spec.data), len(spec.validation)) == (N, 10)
    assert spec.data.url == prepare(request).spec.data.url


@pytest.mark.parametrize(
    ("data", "run_dir", "message"),
    [
        ({"x": np.array(["a", "b"]), "y": np.arange(2)}, "run", r"strings or objects in \['x'\].*ingest"),
        ({"x": X, "z": Y}, "run", "wanted target="),
        ({"y": Y}, "run", "no input besides the target 'y'"),
        ((X, Y), "s3://bucket/run", r"data in memory for a run at s3://bucket/run.*ingest"),
        (7, "run", "source: got int, wanted an xarray.Dataset"),
        ((X[:0], Y[:0]), "run", "no examples"),
    ],
)
def test_what_is_refused(tmp_path, data, run_dir, message):
    with pytest.raises(DataError, match=message):
        dataset_of(data, run_dir if "://" in run_dir else tmp_path / run_dir)
    assert list(tmp_path.iterdir()) == []


def test_large_data_are_not_read(tmp_path, monkeypatch):
    class Untouched:
        shape, dtype, chunks = (1 << 40, 4), np.dtype("f4"), ()

        def __getitem__(self, rows):
            pytest.fail("read")

    with pytest.raises(DataError, match=r"got 32\.00 TiB in memory, wanted at most 512\.00 MiB.*ingest"):
        dataset_of({"x": Untouched(), "y": Untouched()}, tmp_path / "run")
    monkeypatch.setattr(checked, "_LARGEST", 1000)
    with pytest.raises(DataError, match=r"wanted at most 0\.98 kiB"):
        dataset_of((X, Y), tmp_path / "run")
