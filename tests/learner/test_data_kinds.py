"""Every kind of data that the table of bad and odd input allows reaches the model as it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feed_oracle import uniform
from numpy.testing import assert_allclose, assert_array_equal

from dask_isgd.checks.request import RunRequest, prepare
from dask_isgd.config import Learning, Scoring
from dask_isgd.core.batch import Prepare
from dask_isgd.errors import LabelError
from dask_isgd.learner.feed import open_feed
from dask_isgd.storage import Dataset, write_dataset

N, CPU = 37, torch.device("cpu")
X = np.random.default_rng(0).integers(0, 100, (N, 4))
WAYS = {
    "in memory": (False, 10**6, 0),
    "chunk files": (False, 1, 0),
    "copy": (True, 1, 10**6),
    "store": (True, 1, 0),
}


def dataset(folder, x, y, *, compressed=False, **options):
    write_dataset(
        folder / "d", "train", {"x": x, "y": y}, inputs="x", target="y", chunk_size=8, compressed=compressed, **options
    )
    return Dataset(folder / "d")


def batches(data, way, batch, steps=6):
    _, memory, disk = WAYS[way]
    settings = Learning(steps=steps, batch_size=batch, cache_memory=memory, cache_disk=disk)
    feed = open_feed(data, uniform(N, batch=batch), Prepare(data, CPU), settings, timeout=30)
    try:
        return [feed(step, steps) for step in range(steps)]
    finally:
        feed.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "tensor"),
    [("u1", torch.uint8), ("i2", torch.int16), ("u2", torch.int64), ("f2", torch.float32), ("f8", torch.float32),
     ("?", torch.bool)],
)  # fmt: skip
def test_inputs(tmp_path, way, dtype, tensor):
    x = X.astype(dtype)
    data = dataset(tmp_path, x, np.zeros(N, "i8"), compressed=WAYS[way][0])
    for batch in batches(data, way, 8):
        assert batch.inputs[0].dtype == tensor
        assert_array_equal(batch.inputs[0].numpy(), x[batch.draw.indices])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "?"])
def test_labels_are_long(tmp_path, way, dtype):
    y = (np.arange(N) % 2).astype(dtype)
    data = dataset(tmp_path, X, y, compressed=WAYS[way][0])
    data.check(2)
    for batch in batches(data, way, 8):
        assert batch.targets.dtype == torch.int64
        assert_array_equal(batch.targets.numpy(), y[batch.draw.indices])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_regression_targets_are_floats(tmp_path, way, dtype):
    y = np.linspace(-1, 1, N * 2).reshape(N, 2).astype(dtype)
    data = dataset(tmp_path, X, y, compressed=WAYS[way][0])
    data.check()
    for batch in batches(data, way, 8):
        assert batch.targets.dtype == torch.float32
        assert_allclose(batch.targets.numpy(), y[batch.draw.indices], rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 36, 37, 38, 100], ids=lambda b: f"batch of {b} of 37")
def test_batches_larger_than_the_data_and_a_short_last_chunk(tmp_path, way, batch):
    data = dataset(tmp_path, X, np.arange(N), compressed=WAYS[way][0])
    for made in batches(data, way, batch, steps=2):
        assert len(made.targets) == batch
        assert_array_equal(made.inputs[0].numpy(), X[made.draw.indices])


def test_normalisation_is_applied_to_bytes_as_to_floats(tmp_path):
    constants = {"x": {"mean": [1.0, 2, 3, 4], "std": [2.0, 2, 2, 4]}}
    data = dataset(tmp_path, X.astype("u1"), np.zeros(N, "i8"), normalisation=constants)
    (batch,) = batches(data, "in memory", 8, steps=1)
    want = (X[batch.draw.indices] - [1, 2, 3, 4]) / [2, 2, 2, 4]
    assert_allclose(batch.inputs[0].numpy(), want, rtol=1e-6)


def squares(output, target):
    return (output[:, 0] - target) ** 2


def line():
    return torch.nn.Linear(4, 1)


@pytest.mark.parametrize("least", [-100, -1])
def test_negative_integers_are_numbers_where_the_loss_is_ones_own(tmp_path, least):
    data = dataset(tmp_path, X.astype("f4"), np.arange(N) + least)
    plan = prepare(
        RunRequest(
            model=line, data=data, run_dir=tmp_path / "run", loss=squares, learning=Learning(steps=1), scoring=Scoring()
        )
    )
    assert plan.spec.examples == N
    with pytest.raises(LabelError, match="a loss of your own"):
        prepare(
            RunRequest(model=line, data=data, run_dir=tmp_path / "run", learning=Learning(steps=1), scoring=Scoring())
        )


def test_a_dataset_that_names_its_classes_has_classes_whatever_the_loss(tmp_path):
    data = dataset(tmp_path, X.astype("f4"), np.arange(N) - 1, classes=40)
    with pytest.raises(LabelError, match="from -1 to 35, wanted 0 to 39"):
        data.check(classify=False)
