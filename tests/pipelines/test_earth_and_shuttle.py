"""Where importance sampling helps much, and where little: Statlog's shuttle, a land mask, the Earth's relief."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dask_isgd.core import models
from dask_isgd.errors import DataError
from dask_isgd.pipelines import PIPELINES
from dask_isgd.pipelines.datasets import relief, shuttle
from dask_isgd.pipelines.datasets.sphere import random_places
from dask_isgd.pipelines.models import FourierFeatures
from dask_isgd.storage import Dataset


def available(source) -> bool:
    """Whether the files are on this machine; ``.ci/run`` unpacks them from Debian's packages."""
    try:
        source.find()
    except DataError:
        return False
    return True


@pytest.mark.skipif(not available(shuttle.SOURCE), reason="needs Debian's r-cran-mlbench")
def test_the_shuttle_has_statlogs_split_and_classes(tmp_path):
    train = Dataset(PIPELINES["shuttle"].prepare(str(tmp_path / "s.zarr")), group="train")
    test = train.split("test")
    train.check()
    assert (len(train), len(test), train.classes) == (43_500, 14_500, 7)
    assert np.bincount(train.load().target).tolist() == [34_108, 37, 132, 6748, 2458, 6, 11]
    mean, std = train.normalisation["state"]
    states = (train.load().inputs[0].astype(np.float64) - mean) / std
    assert np.abs(states.mean(0)).max() < 1e-4
    assert np.abs(states.std(0) - 1).max() < 1e-3


@pytest.mark.skipif(not available(relief.SOURCE), reason="needs Debian's ferret-datasets")
def test_the_relief_has_mountains_where_they_are(tmp_path):
    field = relief._read(relief.SOURCE.find()["etopo20.cdf"])
    places = {"Tibet": (32.0, 88.0, 4.0, 6.0), "Mariana": (15.0, 150.0, -7.0, -4.0), "Amazon": (-4.0, -62.0, 0.0, 0.3)}
    for latitude, longitude, low, high in places.values():
        assert low < relief._at(field, np.array([latitude]), np.array([longitude]))[0] < high
    train = Dataset(PIPELINES["relief"].prepare(str(tmp_path / "r.zarr")), group="train")
    train.check()
    rows = train.load()
    assert rows.inputs[0].shape == (200_000, 3)
    assert rows.target.mean() == pytest.approx(-2.4, abs=0.15)  # the mean elevation of the solid Earth, in kilometres


@pytest.mark.slow  # the mask takes 0.9 GB of memory and seconds to unpack
def test_the_land_mask_covers_the_share_of_the_earth_that_is_land(tmp_path):
    pytest.importorskip("global_land_mask", reason="needs dask_isgd[datasets]")
    train = Dataset(PIPELINES["land-mask"].prepare(str(tmp_path / "l.zarr")), group="train")
    train.check()
    rows = train.load()
    assert rows.target.mean() == pytest.approx(0.29, abs=0.04)  # with the Caspian Sea's bed, which lies below 0
    x, y, z = rows.inputs[0].T
    antarctica = z < np.sin(np.radians(-85))
    assert rows.target[antarctica].mean() > 0.95  # all but ice shelves
    pacific = (np.abs(z) < np.sin(np.radians(20))) & (np.abs(np.degrees(np.arctan2(y, x)) + 125) < 10)
    assert not rows.target[pacific].any()


def test_elevations_between_the_middles_of_cells_are_linear_also_across_the_seam():
    rows, columns = 540, 1080
    latitudes = -90 + (np.arange(rows) + 0.5) / 3
    field = np.repeat(latitudes[:, None], columns, axis=1).astype(np.float32)
    asked = np.linspace(-89.5, 89.5, 50)
    assert relief._at(field, asked, np.zeros(50)) * 1000 == pytest.approx(asked, abs=1e-3)
    along = np.tile(np.cos(2 * np.pi * np.arange(columns) / columns), (rows, 1)).astype(np.float32)
    degrees = np.linspace(-180, 180, 721)
    expected = np.cos(np.radians(degrees - 20 - 1 / 6))
    assert relief._at(along, np.zeros(721), degrees) * 1000 == pytest.approx(expected, abs=1e-4)


def test_places_are_uniform_on_the_sphere():
    latitudes, longitudes, vectors = random_places(20_000, 0)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.sin(np.radians(latitudes)) == pytest.approx(vectors[:, 2], abs=1e-6)
    assert np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0])) == pytest.approx(longitudes, abs=1e-3)
    assert np.abs(vectors.mean(0)).max() < 4 / np.sqrt(3 * 20_000)
    assert np.cov(vectors.T) == pytest.approx(np.eye(3) / 3, abs=0.01)


@pytest.mark.parametrize(("name", "file"), [("shuttle", "Shuttle.rda"), ("relief", "etopo20.cdf")])
def test_what_is_not_there_or_not_theirs_is_one_sentence(tmp_path, name, file):
    prepare = PIPELINES[name].prepare
    with pytest.raises(DataError, match=f"{name}: got no {file}.*apt install"):
        prepare(str(tmp_path / "d.zarr"), source=str(tmp_path))
    (tmp_path / file).write_bytes(b"not a file of this kind")
    with pytest.raises(DataError, match=file):
        prepare(str(tmp_path / "d.zarr"), source=str(tmp_path))
    assert not (tmp_path / "d.zarr").exists()


@pytest.mark.parametrize(("name", "shape", "out"), [("shuttle", (9,), 7), ("land-mask", (3,), 2), ("relief", (3,), 1)])
def test_the_models_take_the_examples_and_are_the_same_everywhere(name, shape, out):
    first, second = models.build(PIPELINES[name].recipe.model, 1), models.build(PIPELINES[name].recipe.model, 1)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    assert first(x).shape == (4, out)
    assert torch.equal(first(x), second(x))


def test_fourier_features_depend_on_no_global_seed():
    torch.manual_seed(1)
    one = FourierFeatures(3, 8, 4.0)
    torch.manual_seed(2)
    x = torch.ones(2, 3)
    assert torch.equal(one(x), FourierFeatures(3, 8, 4.0)(x))
    assert one(x).square().sum(1) == pytest.approx(8.0, rel=1e-5)
