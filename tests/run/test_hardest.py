"""The heaviest examples, against a sort of all of them; pictures where there are any."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from dask_isgd.run import hardest
from dask_isgd.storage import Dataset, WeightArray, write_dataset

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def weights(tmp_path):
    array = WeightArray.create(tmp_path / "w.zarr", 1000, 64)
    rng = np.random.default_rng(0)
    for chunk in range(array.n_chunks - 1):  # the last was never scored
        start, stop = array.bounds(chunk)
        array.write(chunk, rng.lognormal(0, 1, stop - start))
    stamps = np.full((array.n_chunks, 3), np.nan)
    stamps[:-1, 0] = 100 + np.arange(array.n_chunks - 1)
    array.write_stamps(stamps)
    return array


@pytest.mark.parametrize("k", [1, 10, 63, 64, 65, 960, 5000])
def test_the_k_heaviest(weights, k):
    found = hardest.hardest(weights, k, step=150)
    everything = weights.read_all()[:960]
    order = np.argsort(-everything, kind="stable")[:k]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_array_equal(found.weights, everything[order])
    np.testing.assert_array_equal(found.ages, 150 - (100 + order // 64))
    assert len(found.to_dataframe()) == min(k, 960)


def test_none_are_none(tmp_path):
    array = WeightArray.create(tmp_path / "w.zarr", 10, 5)
    found = hardest.hardest(array, 3, step=0)
    assert len(found) == 0
    assert found._repr_html_()
    with pytest.raises(ValueError, match="got k=0, wanted at least 1"):
        hardest.hardest(array, 0, step=0)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((5, 8, 8), (5, 8, 8)),
        ((5, 8, 9, 1), (5, 8, 9)),
        ((5, 8, 9, 3), (5, 8, 9, 3)),
        ((5, 3, 8, 9), (5, 8, 9, 3)),
        ((5, 1, 8, 9), (5, 8, 9)),
        ((5, 64), None),
        ((5, 2, 2), None),
        ((5, 8, 8, 7), None),
        ((0, 8, 8), None),
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_what_is_a_picture(shape, wanted, dtype):
    inputs = (255 * np.random.default_rng(0).random(shape)).astype(dtype)
    found = hardest.images(inputs)
    assert (None if found is None else found.shape) == wanted
    if found is not None:
        assert (found.min(), found.max(), found.dtype) == (0, 255, np.uint8)
        read = imread(io.BytesIO(hardest.png(found[0])))
        assert read.shape[:2] == wanted[1:3]


def test_the_page_shows_labels_that_the_model_doubts(tmp_path, weights):
    images = np.random.default_rng(1).integers(0, 255, (1000, 8, 8)).astype(np.uint8)
    labels = np.arange(1000) % 10
    write_dataset(tmp_path / "d.zarr", "train", {"x": images, "y": labels}, inputs="x", target="y", chunk_size=64)
    data = Dataset(tmp_path / "d.zarr", group="train")

    def always_three(x):
        import torch

        return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    found = hardest.hardest(weights, 20, step=150, data=data, model=always_three)
    np.testing.assert_array_equal(found.targets, labels[found.indices])
    assert (found.predictions == 3).all()
    page = found._repr_html_()
    assert page.count("data:image/png;base64,") == 20
    assert page.count("#D55E00") == (labels[found.indices] != 3).sum()
    assert list(found.to_dataframe()) == ["index", "weight", "age", "target", "prediction"]
    assert "<Hardest: 20 examples>" in repr(found)


def test_classes_are_called_by_their_names_and_weights_are_plain_numbers():
    columns = (np.array([1, 2]), np.array([187.4, 1234.0], "f4"), np.array([0.0, 5.0]), np.array([3, 1]))
    found = hardest.Hardest(*columns, predictions=np.array([1, 9]), class_names=["top", "<b>", "hat", "dress"])
    page = found._repr_html_()
    for text in ("weight 187<", "weight 1,234<", "label dress<", "model &lt;b&gt;<", "label &lt;b&gt;<", "model 9<"):
        assert text in page
    assert found.name_of(1.5) == "1.5"


def test_those_whose_label_the_model_doubts():
    images = np.arange(4 * 25).reshape(4, 5, 5).astype("u1")
    columns = (np.arange(4), np.arange(4, 0, -1).astype("f4"), np.zeros(4), np.array([0, 1, 2, 3]))
    found = hardest.Hardest(
        *columns, predictions=np.array([0, 3, 2, 1]), images=images, class_names=[*"abcd"]
    ).doubted()
    assert found.indices.tolist() == [1, 3]
    assert found.to_dataframe().prediction.tolist() == [3, 1]
    assert found.images.shape == (2, 5, 5)
    assert found.name_of(found.targets[1]) == "d"
    assert len(hardest.Hardest(*columns).doubted()) == 0


def test_text_is_escaped():
    found = hardest.Hardest(np.array([1]), np.array([1.0], "f4"), np.array([0.0]), np.array([EVIL]))
    assert "<script" not in found._repr_html_()
    assert "&lt;script" in found._repr_html_()
