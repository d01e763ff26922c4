"""Tables: columns stacked, integers normalised, strings coded, missing values filled, dropped or named."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from numpy.testing import assert_allclose, assert_array_equal

from dask_isgd.errors import DataError, EmptyDatasetError
from dask_isgd.pipelines import ingest
from dask_isgd.pipelines.cli import isgd
from dask_isgd.storage import Dataset

N = 60
RNG = np.random.default_rng(0)
AGE = RNG.integers(18, 90, N)
INCOME = RNG.lognormal(10, 1, N)
COLOUR = np.array(["red", "green", "blue"])[RNG.integers(0, 3, N)].astype(object)
FRAME = pd.DataFrame(
    {"age": AGE, "income": INCOME, "colour": COLOUR, "zip": RNG.choice([1010, 2020, 8010], N), "row": np.arange(N),
     "target": RNG.integers(0, 2, N)}
)  # fmt: skip
HOLES = FRAME.astype({"age": "Int64"})
HOLES.loc[[3, 7, 11], "age"] = pd.NA
HOLES.loc[[7, 20], "income"] = np.nan
HOLES.loc[[5], "colour"] = None
ORDER = {"train": np.arange(40), "test": np.arange(40, N)}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def made(tmp_path, frame, **settings):
    url = ingest(frame, tmp_path / "d", splits=settings.pop("splits", ORDER), target="target", **settings)
    data = Dataset(url)
    return data, data.load().inputs


class TestFeatures:
    def test_numbers_are_stacked_and_normalised_integers_too(self, tmp_path):
        data, (features,) = made(tmp_path, FRAME, features=["age", "income"])
        assert_allclose(features, np.stack([AGE, INCOME], 1)[:40], rtol=1e-6)
        mean, std = data.normalisation["features"]
        assert_allclose(mean, [AGE[:40].mean(), INCOME[:40].mean()], rtol=1e-6)
        assert_allclose(std, [AGE[:40].std(), INCOME[:40].std()], rtol=1e-5)

    def test_strings_are_one_hot_and_not_normalised(self, tmp_path):
        data, (features,) = made(tmp_path, FRAME, features=["age", "colour"])
        assert data.attributes["features"] == {"features": ["age", "colour=blue", "colour=green", "colour=red"]}
        assert data.attributes["categories"] == {"colour": ["blue", "green", "red"]}
        assert_array_equal(features[:, 1:], np.array(["blue", "green", "red"]) == COLOUR[:40, None])
        mean, std = data.normalisation["features"]
        assert (mean[1:].tolist(), std[1:].tolist()) == ([0, 0, 0], [1, 1, 1])

    def test_strings_among_the_inputs_are_indices(self, tmp_path):
        data, (_, colour) = made(tmp_path, FRAME, features=["income"], inputs=["colour"])
        assert data.input_names == ("features", "colour")
        assert_array_equal(np.array(data.attributes["categories"]["colour"])[colour], COLOUR[:40])
        assert list(data.normalisation) == ["features"]

    def test_numbers_that_are_categories(self, tmp_path):
        data, (features,) = made(tmp_path, FRAME, features={"x": ["zip", "age"]}, categorical=["zip"])
        assert data.attributes["features"] == {"x": ["zip=1010", "zip=2020", "zip=8010", "age"]}
        assert_array_equal(features[:, :3].argmax(1), np.searchsorted([1010, 2020, 8010], FRAME["zip"][:40]))

    def test_a_pandas_category_is_a_string(self, tmp_path):
        data, _ = made(tmp_path, FRAME.astype({"colour": "category"}), features=["colour"])
        assert data.attributes["categories"] == {"colour": ["blue", "green", "red"]}

    def test_by_default_numbers_are_stacked_and_the_rest_is_named(self, tmp_path, caplog):
        data, _ = made(tmp_path, FRAME, time="row", splits={"train": 0.8, "test": 0.2})
        assert data.attributes["features"] == {"features": ["age", "income", "zip"]}
        assert "the columns 'colour' are left out" in caplog.text

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"features": ["nothing"]}, "features: got 'nothing'"),
            ({"features": ["target"]}, "features: got 'target'.*not the target"),
            ({"features": ["age", "age"]}, "wanted a list of different columns"),
            ({"features": {"age": ["row"]}}, "which is a column already"),
            ({"features": ["age"], "categorical": ["zip"]}, r"categorical: got \['zip'\]"),
            ({"features": ["age"], "missing": {"zip": 0}}, r"missing: got \['zip'\]"),
            ({"features": ["age"], "missing": "zero"}, "missing: got 'zero', wanted 'refuse'"),
            ({"features": ["age"], "mask": True}, "mask: got True with missing='refuse'"),
            ({"inputs": ["age"], "missing": "mean", "mask": True}, r"mask: got True, wanted features="),
        ],
    )
    def test_arguments_that_are_wrong(self, tmp_path, settings, message):
        with pytest.raises(DataError, match=message):
            made(tmp_path, FRAME, **settings)

    def test_too_many_categories_for_one_hot(self, tmp_path):
        frame = pd.DataFrame({"name": [f"n{i}" for i in range(1001)], "x": np.arange(1001.0), "target": 0})
        with pytest.raises(DataError, match=r"1,001 categories.*for an embedding"):
            ingest(frame, tmp_path / "d", features=["name", "x"])
        assert len(Dataset(ingest(frame, tmp_path / "d", inputs=["name"])).attributes["categories"]["name"]) == 1001


class TestMissing:
    @pytest.mark.parametrize("rule", ["mean", "median", -1])
    def test_numbers_are_filled_from_the_training_split(self, tmp_path, caplog, rule):
        data, (features,) = made(tmp_path, HOLES, features=["age", "income"], missing=rule)
        known = AGE[[i for i in range(40) if i not in (3, 7, 11)]]
        fill = {"mean": known.mean(), "median": np.median(known), -1: -1}[rule]
        assert_allclose(features[[3, 7, 11], 0], fill, rtol=1e-6)
        assert_array_equal(np.delete(features[:, 0], [3, 7, 11]), known)
        assert data.attributes["filled"]["age"] == {"value": pytest.approx(fill), "rows": 3}
        assert "missing values in 3 rows of 'age' are replaced by" in caplog.text
        assert data.attributes["finite"]

    def test_masks(self, tmp_path):
        data, (features,) = made(tmp_path, HOLES, features=["age", "row", "income"], missing="mean", mask=True)
        assert data.attributes["features"]["features"] == [
            "age", "age is missing", "row", "income", "income is missing"
        ]  # fmt: skip
        assert np.flatnonzero(features[:, 1]).tolist() == [3, 7, 11]
        assert np.flatnonzero(features[:, 4]).tolist() == [7, 20]
        assert data.normalisation["features"][0][[1, 4]].tolist() == [0, 0]

    def test_each_column_in_its_own_way(self, tmp_path):
        data, (features,) = made(
            tmp_path, HOLES, features=["age", "income", "colour"],
            missing={"age": "median", "income": 0, "colour": "unknown"},
        )  # fmt: skip
        assert data.attributes["categories"]["colour"] == ["blue", "green", "red", "unknown"]
        assert features[5, 2:].tolist() == [0, 0, 0, 1]
        assert features[[7, 20], 1].tolist() == [0, 0]

    def test_rows_are_dropped(self, tmp_path, caplog):
        url = ingest(HOLES, tmp_path / "d", features=["row", "age", "colour"], missing="drop",
                     splits={"train": 1.0}, memory=4_000)  # fmt: skip
        rows = Dataset(url).load().inputs[0][:, 0]
        assert sorted(rows) == [i for i in range(N) if i not in (3, 5, 7, 11)]
        assert "4 of 60 rows lack a value and are left out ('age': 3, 'colour': 1)" in caplog.text

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"features": ["age"]}, "missing or infinite, first in row 3.*missing='drop', a fill"),
            ({"features": ["colour"]}, "'colour': got a missing value in row 5.*'unknown'"),
            ({"features": ["colour"], "missing": "mean"}, "got the fill 'mean' for categories"),
            ({"features": ["age"], "missing": {"age": "x"}}, "got the fill 'x' for numbers"),
            ({"features": ["age"], "missing": "drop"}, "'drop' with splits by row numbers"),
        ],
    )
    def test_what_is_refused(self, tmp_path, settings, message):
        with pytest.raises(DataError, match=message):
            made(tmp_path, HOLES, **settings)

    def test_a_missing_target_is_refused_or_dropped(self, tmp_path):
        frame = pd.DataFrame({"x": np.arange(20.0), "target": ["a", None] * 10})
        with pytest.raises(DataError, match=r"'target': got no value in row 1.*missing='drop'"):
            ingest(frame, tmp_path / "d")
        assert len(Dataset(ingest(frame, tmp_path / "d", missing="drop", splits={"train": 1.0}))) == 10
        with pytest.raises(EmptyDatasetError, match="every one of 20 rows"):
            ingest(frame.assign(x=np.nan), tmp_path / "e", missing="drop")

    def test_arrays_are_filled_number_by_number(self, tmp_path):
        x = RNG.normal(size=(N, 3))
        x[4, 1] = np.nan
        url = ingest((x, FRAME["target"]), tmp_path / "d", missing="mean", splits=ORDER)
        assert Dataset(url).load().inputs[0][4, 1] == pytest.approx(np.nanmean(x[:40, 1]))


def test_a_recipe_says_it_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HOLES.to_csv("people.csv", index=False)
    (tmp_path / "people.yaml").write_text(
        "source: {csv: people.csv}\ntarget: target\nfeatures: [age, colour]\ninputs: [zip]\ncategorical: [zip]\n"
        "missing: {age: mean, colour: unknown}\nmask: true\n"
    )
    result = CliRunner().invoke(isgd, ["prepare", "people.yaml"])
    assert (result.exit_code, result.stdout) == (0, "data/people.zarr\n"), result.output
    assert Dataset("data/people.zarr").attributes["features"]["features"][:2] == ["age", "age is missing"]
