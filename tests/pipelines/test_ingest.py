"""Ingestion writes every row once, where it belongs, for any source and memory, and after a crash."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml
import zarr
from click.testing import CliRunner
from numpy.testing import assert_allclose, assert_array_equal

from dask_isgd.errors import DataError, EmptyDatasetError, LabelError, LengthMismatchError
from dask_isgd.pipelines import ingest
from dask_isgd.pipelines.cli import isgd
from dask_isgd.pipelines.ingestion import assembly, passes
from dask_isgd.pipelines.ingestion import ingest as ingestion
from dask_isgd.pipelines.ingestion.splits import by_fraction, by_group, by_time, destinations
from dask_isgd.pipelines.ingestion.statistics import Moments
from dask_isgd.pipelines.ingestion.tables.frame_files import open_parquet
from dask_isgd.pipelines.ingestion.tables.images import ImageTable
from dask_isgd.storage import Dataset

N = 503
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (N, 3, 5)).astype("u1")
WIDE = RNG.normal(3, 2, (N, 4))
LABEL = RNG.integers(0, 7, N)
ARRAYS = {"image": IMAGE, "wide": WIDE, "row": np.arange(N), "label": LABEL}


def load(url, *splits):
    return {split: Dataset(url, group=split).load() for split in splits}


def by_name(url, split):
    data = Dataset(url, group=split)
    rows = data.load()
    return dict(zip([*data.input_names, data.target_name], [*rows.inputs, rows.target], strict=True))


class TestRows:
    @pytest.mark.parametrize("memory", [2_500, 5_000, 10**9], ids=["small blocks", "blocks", "all at once"])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_every_row_once_with_its_own_values(self, tmp_path, memory, compressed):
        url = ingest(ARRAYS, tmp_path / "d", memory=memory, chunk_size=16, compressed=compressed)
        found = {split: by_name(url, split) for split in ("train", "validation")}
        rows = np.concatenate([found["train"]["row"], found["validation"]["row"]])
        assert sorted(rows) == list(range(N))
        assert [len(part["row"]) for part in found.values()] == [453, 50]
        for part in found.values():
            assert_array_equal(part["image"], IMAGE[part["row"]])
            assert_array_equal(part["wide"], WIDE[part["row"]].astype("f4"))
            assert_array_equal(part["label"], LABEL[part["row"]])
        assert os.listdir(tmp_path) == ["d"]

    def test_the_same_bits_whatever_the_memory(self, tmp_path):
        urls = [ingest(ARRAYS, tmp_path / str(m), memory=m, chunk_size=16) for m in (2_500, 5_000, 10**9)]
        chunks = [
            {p.relative_to(u): p.read_bytes() for p in sorted((tmp_path / u).rglob("c/**/*")) if p.is_file()}
            for u in urls
        ]
        assert chunks[0] == chunks[1] == chunks[2]

    def test_a_permutation_of_all_and_seeded(self, tmp_path):
        orders = [
            by_name(ingest(ARRAYS, tmp_path / f"{i}", seed=seed, chunk_size=16), "train")["row"]
            for i, seed in enumerate([0, 0, 1])
        ]
        assert_array_equal(orders[0], orders[1])
        assert (orders[0] != orders[2]).mean() > 0.9
        # Across chunks: a row's place tells next to nothing about its place in the source.
        assert abs(np.corrcoef(np.arange(len(orders[0])), orders[0])[0, 1]) < 0.15
        first = orders[0][:16]
        assert first.min() < N / 4
        assert first.max() > 3 * N / 4

    def test_unshuffled(self, tmp_path):
        url = ingest(ARRAYS, tmp_path / "d", shuffle=False, splits={"train": 0.8, "test": 0.2})
        assert_array_equal(by_name(url, "train")["row"], np.arange(403))

    @pytest.mark.parametrize("chunk_size", [1, 7, 503, 1000])
    def test_chunks(self, tmp_path, chunk_size):
        url = ingest(ARRAYS, tmp_path / "d", chunk_size=chunk_size, splits={"train": 1.0}, memory=5_000)
        data = Dataset(url)
        assert data.chunk_size == chunk_size
        assert sorted(by_name(url, "train")["row"]) == list(range(N))

    def test_the_dataset_is_verified_and_opened_by_xarray(self, tmp_path):
        url = ingest(ARRAYS, tmp_path / "d", chunk_size=16)
        with xr.open_zarr(url, group="train") as opened:
            assert opened.image.dims[0] == "sample"
            assert opened.attrs["isgd"]["target"] == "label"
        codecs = [type(c).__name__ for c in zarr.open_array(f"{url}/train/image", mode="r").metadata.codecs]
        assert codecs[-1] == "Crc32cCodec"
        Dataset(url).check()
        assert Dataset(url).raw is not None

    @pytest.mark.parametrize("compressed", [False, True])
    def test_rows_of_zeros_are_written_like_all_others(self, tmp_path, compressed):
        zeros = {"image": np.zeros((64, 3), "u1"), "label": np.zeros(64, int)}
        url = ingest(zeros, tmp_path / "d", chunk_size=16, compressed=compressed, splits={"train": 1.0})
        for name in zeros:
            chunks = (tmp_path / "d" / "train" / name / "c").rglob("*")
            assert sum(path.is_file() for path in chunks) == 4
        Dataset(url).check()


class TestStatistics:
    @pytest.mark.parametrize(
        ("mode", "axes"), [("all", (0, 1, 2)), ("each", (0,)), ("first", (0, 2)), ("last", (0, 1))]
    )
    def test_normalisation_is_computed_from_the_first_split(self, tmp_path, mode, axes):
        url = ingest(ARRAYS, tmp_path / "d", normalise={"image": mode}, memory=4_000, chunk_size=16)
        train = by_name(url, "train")["image"].astype(float)
        for split in ("train", "validation"):
            mean, std = Dataset(url, group=split).normalisation["image"]
            for got, want in ((mean, train.mean(axes, keepdims=True)), (std, train.std(axes, keepdims=True))):
                assert_allclose(np.broadcast_to(got, (3, 5)), np.broadcast_to(want[0], (3, 5)), rtol=1e-6)

    def test_by_default_floats_and_images_are_normalised_and_tokens_are_not(self, tmp_path):
        arrays = {"image": IMAGE, "wide": WIDE, "token": LABEL, "bytes": IMAGE[:, 0], "y": LABEL}
        found = Dataset(ingest(arrays, tmp_path / "d")).normalisation
        assert {name: mean.shape for name, (mean, _) in found.items()} == {"image": (), "wide": (4,)}
        assert Dataset(ingest(arrays, tmp_path / "e", normalise="none")).normalisation is None

    def test_a_constant_number_is_not_divided_by_zero(self, tmp_path):
        url = ingest({"x": np.full((50, 3), 7.0), "y": LABEL[:50]}, tmp_path / "d")
        assert_array_equal(Dataset(url).normalisation["x"][1], [1, 1, 1])

    def test_moments_add_up_far_from_zero(self):
        rows = RNG.normal(1e6, 1e-3, (1000, 2))
        total = Moments.of(rows[:10])
        for a in range(10, 1000, 90):
            total = total + Moments.of(rows[a : a + 90])
        assert_allclose(total.mean, rows.mean(0), rtol=1e-14)
        assert_allclose(np.sqrt(total.spread / 1000), rows.std(0), rtol=1e-6)

    def test_classes_and_their_counts(self, tmp_path):
        url = ingest(ARRAYS, tmp_path / "d", splits={"train": 0.7, "test": 0.3}, memory=4_000)
        assert Dataset(url).classes == 7
        for split in ("train", "test"):
            attributes = zarr.open_group(f"{url}/{split}", mode="r").attrs["isgd"]
            assert attributes["class_counts"] == np.bincount(by_name(url, split)["label"], minlength=7).tolist()

    def test_strings_become_classes_with_names(self, tmp_path):
        names = np.array(["cat", "ant", "dog"])[LABEL % 3]
        url = ingest({"x": WIDE, "row": np.arange(N), "y": names}, tmp_path / "d", target="y")
        found = by_name(url, "train")
        assert_array_equal(np.array(["ant", "cat", "dog"])[found["y"]], names[found["row"]])
        assert zarr.open_group(f"{url}/train", mode="r").attrs["isgd"]["class_names"] == ["ant", "cat", "dog"]

    def test_labels_that_do_not_start_at_zero(self, tmp_path):
        arrays = {"x": WIDE, "y": LABEL - 1}
        with pytest.raises(LabelError, match=r"label of -1 at row \d+.*relabel=True.*classify=False"):
            ingest(arrays, tmp_path / "d")
        assert Dataset(ingest(arrays, tmp_path / "e", relabel=True)).classes == 7
        url = ingest(arrays, tmp_path / "f", classify=False)
        assert Dataset(url).classes is None
        assert by_name(url, "train")["y"].min() == -1
        Dataset(url).check(classify=False)


class TestSplits:
    def test_fractions(self):
        split = by_fraction(RNG.permutation(100), {"a": 0.5, "b": 0.3, "c": 0.2})
        assert np.bincount(split).tolist() == [50, 30, 20]

    @pytest.mark.parametrize("splits", [{"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": "x", "b": 1}, {"a": True}])
    def test_bad_fractions(self, tmp_path, splits):
        with pytest.raises(DataError, match="add up to 1"):
            ingest(ARRAYS, tmp_path / "d", splits=splits)

    def test_a_group_is_in_one_split(self, tmp_path):
        arrays = {**ARRAYS, "patient": RNG.integers(0, 40, N)}
        splits = {"train": 0.6, "validation": 0.2, "test": 0.2}
        url = ingest(arrays, tmp_path / "d", inputs=["row"], group="patient", splits=splits)
        sets = [set(arrays["patient"][by_name(url, split)["row"]]) for split in splits]
        assert set.union(*sets) == set(range(40))
        assert sum(map(len, sets)) == 40
        sizes = [len(Dataset(url, group=split)) / N for split in splits]
        assert_allclose(sizes, list(splits.values()), atol=0.05)

    def test_groups_of_strings(self):
        split = by_group(np.array(list("aabbccddee")), {"a": 0.8, "b": 0.2}, np.random.default_rng(0))
        assert np.bincount(split).tolist() == [8, 2]

    def test_time_by_fraction_and_by_moment(self):
        days = np.datetime64("2020-01-01") + RNG.permutation(100).astype("m8[D]")
        split = by_time(days, {"train": 0.8, "test": 0.2})
        assert days[split == 0].max() < days[split == 1].min()
        assert np.bincount(split).tolist() == [80, 20]
        split = by_time(days, {"train": "2020-02-01", "validation": "2020-03-01", "test": None})
        assert np.bincount(split).tolist() == [31, 29, 40]
        ties = by_time(np.array([1, 1, 1, 2]), {"a": 0.5, "b": 0.5})
        assert ties.tolist() in ([0, 0, 0, 1], [1, 1, 1, 1])

    def test_moments_out_of_order(self):
        with pytest.raises(DataError, match="wanted them in order"):
            by_time(np.array(["2020-01-01"], "M8[D]"), {"a": "2021-01-01", "b": "2020-01-01", "c": None})

    def test_rows_by_number_keep_their_order(self, tmp_path):
        order = RNG.permutation(N)
        splits = {"train": order[100:], "test": order[:100]}
        url = ingest(ARRAYS, tmp_path / "d", splits=splits, chunk_size=16, memory=4_000)
        for split, rows in splits.items():
            assert_array_equal(by_name(url, split)["row"], rows)
        assert ingest(ARRAYS, url, splits=splits, chunk_size=16) == url
        with pytest.raises(DataError, match="delete it"):
            ingest(ARRAYS, url, splits={**splits, "test": order[:100][::-1]}, chunk_size=16)

    @pytest.mark.parametrize(
        ("splits", "settings", "message"),
        [
            ({"a": np.arange(N - 1)}, {}, f"rows for 'a', wanted each of {N} rows once"),
            ({"a": np.arange(N), "b": np.arange(1)}, {}, "rows for 'a', 'b', wanted each"),
            ({"a": np.arange(N) + 1}, {}, "wanted each"),
            ({"a": np.arange(N) / 1}, {}, "wanted each"),
            ({"a": np.arange(N), "b": 0.1}, {}, "wanted each"),
            ({"a": np.arange(N)}, {"group": "row"}, "one of these at most"),
            ({"a": np.arange(N), "b": np.arange(0)}, {}, "'b': got no rows"),
        ],
    )
    def test_rows_by_number_that_are_wrong(self, tmp_path, splits, settings, message):
        with pytest.raises(DataError, match=message):
            ingest(ARRAYS, tmp_path / "d", splits=splits, **settings)
        assert os.listdir(tmp_path) == []

    def test_destinations_are_a_permutation(self):
        order = RNG.permutation(50)
        split = RNG.integers(0, 3, 50).astype("i1")
        target, ranges = destinations(split, ["a", "b", "c"], order)
        assert sorted(target) == list(range(50))
        for i, (first, last) in enumerate(ranges.values()):
            members = np.flatnonzero((target >= first) & (target < last))
            assert set(split[members]) == {i}
            assert_array_equal(members[np.argsort(target[members])], order[split[order] == i])

    def test_an_empty_split(self, tmp_path):
        with pytest.raises(EmptyDatasetError, match=r"'test'.*of 3"):
            ingest({"x": np.ones(3), "y": np.arange(3)}, tmp_path / "d", splits={"train": 0.9, "test": 0.1})


class TestSources:
    @pytest.mark.parametrize("lazy", [False, True], ids=["netcdf", "netcdf through dask"])
    def test_netcdf_with_other_names_and_time_as_sample(self, tmp_path, lazy):
        days = pd.date_range("2000-01-01", periods=200)
        field = RNG.normal(size=(4, 200, 6)).astype("f4")
        made = xr.Dataset(
            {
                "temperature": (("level", "time", "lat"), field),
                "rain": ("time", field[0, :, 0] * 2),
                "mask": ("lat", np.ones(6)),
            },
            coords={"time": days},
        )
        made.to_netcdf(tmp_path / "a.nc", engine="scipy")
        with xr.open_dataset(tmp_path / "a.nc", chunks={"time": 30} if lazy else None) as opened:
            url = ingest(
                opened, tmp_path / "d", inputs="temperature", target="rain", dimension="time", time="time",
                splits={"train": 0.75, "test": 0.25}, memory=3_000, chunk_size=10,
            )  # fmt: skip
        train, test = by_name(url, "train"), by_name(url, "test")
        assert train["temperature"].shape == (150, 4, 6)
        moved = field.transpose(1, 0, 2)
        at = [int(np.flatnonzero((moved == row).all((1, 2)))[0]) for row in train["temperature"]]
        assert sorted(at) == list(range(150))  # the earlier three quarters
        assert_array_equal(train["rain"], field[0, at, 0] * 2)
        assert len(test["rain"]) == 50
        assert Dataset(url).classes is None

    def test_zarr_v2_through_xarray(self, tmp_path):
        made = xr.Dataset({"x": (("sample", "p"), WIDE), "y": ("sample", LABEL)})
        made.to_zarr(tmp_path / "v2.zarr", zarr_format=2, consolidated=True)
        url = ingest({"xarray": str(tmp_path / "v2.zarr")}, tmp_path / "d")
        assert sorted(by_name(url, "train")["y"]) == sorted(LABEL[np.random.default_rng(0).permutation(N)[:453]])

    def test_numpy_files(self, tmp_path):
        np.save(tmp_path / "x.npy", IMAGE)
        np.save(tmp_path / "y.npy", LABEL)
        np.savez(tmp_path / "both.npz", x=IMAGE, y=LABEL)
        sources = [{"numpy": {"x": tmp_path / "x.npy", "y": tmp_path / "y.npy"}}, {"numpy": str(tmp_path / "both.npz")}]
        first, second = (by_name(ingest(s, tmp_path / f"{i}"), "train") for i, s in enumerate(sources))
        assert_array_equal(first["x"], second["x"])

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dask's use of pandas
    def test_parquet(self, tmp_path):
        frame = pd.DataFrame(
            {"a": WIDE[:, 0], "b": WIDE[:, 1], "row": np.arange(N), "who": np.array(["x", "y", "z"])[LABEL % 3],
             "list": [row.tolist() for row in IMAGE[:, 0]], "target": LABEL}
        )  # fmt: skip
        for i in range(3):
            frame.iloc[i * 200 : (i + 1) * 200].to_parquet(tmp_path / f"part-{i}.parquet")
        source = {"parquet": str(tmp_path / "part-*.parquet")}
        url = ingest(source, tmp_path / "d", inputs=["list", "row"], features=["a", "b"], group="who", memory=2_000,
                     splits={"train": 0.7, "test": 0.3}, dtypes={"list": "uint8"})  # fmt: skip
        found = by_name(url, "train")
        assert_array_equal(found["features"], WIDE[found["row"], :2].astype("f4"))
        assert_array_equal(found["list"], IMAGE[found["row"], 0])
        assert_array_equal(found["target"], LABEL[found["row"]])
        total = sum(len(Dataset(url, group=split)) for split in ("train", "test"))
        assert total == N

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_parquet_spans_across_files(self, tmp_path):
        for i in range(4):
            pd.DataFrame({"x": np.arange(10.0) + 10 * i}).to_parquet(tmp_path / f"{i}.parquet")
        table = open_parquet(str(tmp_path / "*.parquet"))
        assert table.length == 40
        for a, b in [(0, 40), (5, 15), (9, 10), (10, 30), (39, 40), (7, 7)]:
            assert_array_equal(table.read(a, b, ["x"])["x"], np.arange(a, b))
        assert [b for span in table.blocks(4) for b in span][-1] == 40

    def test_images(self, tmp_path):
        from PIL import Image

        pixels = RNG.integers(0, 256, (12, 6, 4, 3)).astype("u1")
        for i in range(12):
            folder = tmp_path / "images" / ("cats" if i % 3 else "dogs")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(folder / f"{i:02d}.png")
        (tmp_path / "images" / "cats" / "readme.txt").write_text("no image")
        url = ingest({"images": str(tmp_path / "images")}, tmp_path / "d", splits={"train": 1.0})
        found = by_name(url, "train")
        assert found["image"].shape == (12, 3, 6, 4)
        for image, label in zip(found["image"], found["label"], strict=True):
            i = int(np.flatnonzero((pixels.transpose(0, 3, 1, 2) == image).all((1, 2, 3)))[0])
            assert label == (0 if i % 3 else 1)
        assert zarr.open_group(f"{url}/train", mode="r").attrs["isgd"]["class_names"] == ["cats", "dogs"]
        grey = ImageTable(tmp_path / "images", size=(3, 3), mode="L").read(0, 2, ["image"])["image"]
        assert grey.shape == (2, 1, 3, 3)
        Image.fromarray(pixels[0][:2]).save(tmp_path / "images" / "dogs" / "z.png")
        with pytest.raises(DataError, match=r"z\.png: got 2×4 pixels, wanted 6×4.*size="):
            ingest({"images": str(tmp_path / "images")}, tmp_path / "e")

    def test_a_cluster_does_the_same(self, tmp_path, client):
        made = xr.Dataset({"x": (("sample", "p"), WIDE), "row": ("sample", np.arange(N)), "y": ("sample", LABEL)})
        made.to_zarr(tmp_path / "s.zarr", consolidated=False)
        opened = xr.open_zarr(tmp_path / "s.zarr", consolidated=False)
        here = ingest(opened, tmp_path / "here", memory=4_000, chunk_size=16)
        there = ingest(opened, tmp_path / "there", memory=4_000, chunk_size=16, client=client)
        for split in ("train", "validation"):
            a, b = by_name(here, split), by_name(there, split)
            assert all(np.array_equal(a[name], b[name]) for name in a)
            assert str(Dataset(here).normalisation) == str(Dataset(there).normalisation)


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["u1", "i2", "f2", "f4", "u2", "i4", "?"])
    def test_inputs_keep_theirs(self, tmp_path, dtype):
        x = (IMAGE % 2).astype(dtype)
        data = Dataset(ingest({"x": x, "y": LABEL}, tmp_path / "d"))
        assert data.arrays["x"].dtype == np.dtype(dtype)

    @pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "i4", "i8", "u8", "?"])
    def test_labels_keep_theirs(self, tmp_path, dtype):
        data = Dataset(ingest({"x": WIDE, "y": (LABEL % 2).astype(dtype)}, tmp_path / "d"))
        data.check()
        assert (data.arrays["y"].dtype, data.classes) == (np.dtype(dtype), 2)

    @pytest.mark.parametrize(
        ("values", "dtype", "message"),
        [
            (np.array([0, 1, 300] * 20), "uint8", "'x': got a value of int64 that uint8 cannot hold, first in row 2"),
            (np.array([0.0, 0.5] * 20), "int16", "cannot hold, first in row 1"),
            (np.array([0.0, 1e300] * 20), "float32", "cannot hold, first in row 1"),
            (np.array([0, 2**24 + 1] * 20), "float32", "cannot hold, first in row 1"),
            (np.array([0.0, np.nan] * 20), "float32", "missing or infinite, first in row 1.*missing='keep'"),
        ],
    )
    def test_a_cast_that_would_change_a_value_is_refused(self, tmp_path, values, dtype, message):
        with pytest.raises(DataError, match=message):
            ingest({"x": values, "y": LABEL[: len(values)]}, tmp_path / "d", dtypes={"x": dtype})
        assert not (tmp_path / "d").exists()

    def test_missing_values_can_be_kept(self, tmp_path):
        values = np.array([0.0, np.nan] * 20)
        url = ingest({"x": values, "y": LABEL[:40]}, tmp_path / "d", missing="keep", normalise="none")
        assert np.isnan(by_name(url, "train")["x"]).sum() > 10

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"target": "nothing"}, DataError, "no column 'nothing'; there are"),
            ({"inputs": ["label"]}, DataError, "wanted each column once"),
            ({"inputs": []}, DataError, "at least one input"),
            ({"dtypes": {"image": "datetime64[s]"}}, DataError, "wanted a boolean"),
            ({"dtypes": {"oops": "u1"}}, DataError, "dtypes of these columns only"),
            ({"normalise": "some"}, DataError, "wanted one of 'auto', 'all'"),
            ({"normalise": {"oops": "all"}}, DataError, "wanted inputs"),
            ({"missing": "ignore"}, DataError, "'refuse', 'keep'"),
            ({"chunk_size": 0}, DataError, "at least 1"),
            ({"group": "row", "time": "row"}, DataError, "one of these at most"),
            ({"target": "wide"}, DataError, None),
        ],
    )
    def test_settings_that_are_wrong(self, tmp_path, settings, error, message):
        if message is None:  # a target of several numbers means regression
            assert Dataset(ingest(ARRAYS, tmp_path / "d", **settings)).classes is None
            return
        with pytest.raises(error, match=message):
            ingest(ARRAYS, tmp_path / "d", **settings)
        assert not (tmp_path / "d").exists()

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            ({"x": np.ones(3), "y": np.ones(4)}, LengthMismatchError, "'x': 3, 'y': 4"),
            ({"x": np.ones((0, 2)), "y": np.ones(0, int)}, EmptyDatasetError, "no rows"),
            (xr.Dataset({"x": ("time", np.ones(3))}), DataError, "'time'.*pass dimension"),
            ({"images": "/nowhere"}, EmptyDatasetError, "no images"),
            ({"parquet": "/nowhere/*.parquet"}, EmptyDatasetError, "no files"),
            ({"xarray": "/nowhere.nc"}, DataError, "cannot be opened"),
            ({"numpy": "/nowhere.npz"}, DataError, "cannot be read"),
            ({"images": "/nowhere", "colour": 3}, DataError, "colour"),
            (7, DataError, "got int"),
        ],
    )
    def test_sources_that_are_wrong(self, tmp_path, source, error, message):
        with pytest.raises(error, match=message):
            ingest(source, tmp_path / "d")


class TestWholeOrNotAtAll:
    def crash_at(self, monkeypatch, name, i):
        """Make the pass ``name`` end at item ``i`` as if the process had been killed; return the items that ran."""
        ran, run = [], getattr(ingestion, name)

        def crashing(plan, at):
            if at == i:
                raise KeyboardInterrupt
            ran.append(at)
            return run(plan, at)

        monkeypatch.setattr(ingestion, name, crashing)
        return ran

    @pytest.mark.parametrize(("name", "i"), [("scatter", 2), ("collect", 0), ("collect", 3)])
    def test_after_a_crash_it_resumes(self, tmp_path, monkeypatch, name, i):

        settings = {"memory": 5_000, "chunk_size": 16}
        whole = ingest(ARRAYS, tmp_path / "whole", **settings)
        with monkeypatch.context() as patch:
            self.crash_at(patch, name, i)
            with pytest.raises(KeyboardInterrupt):
                ingest(ARRAYS, tmp_path / "d", **settings)
        assert not (tmp_path / "d").exists()
        with pytest.raises(EmptyDatasetError):
            Dataset(tmp_path / "d")
        done = {p: p.stat().st_mtime_ns for p in tmp_path.glob(".d.*/*/*") if p.parent.name in ("blocks", "buckets")}
        assert len(done) >= i
        kept = []
        save = np.savez
        monkeypatch.setattr(passes.np, "savez", lambda file, **found: kept.append(file) or save(file, **found))
        url = ingest(ARRAYS, tmp_path / "d", **settings)
        assert sorted(os.listdir(tmp_path)) == ["d", "whole"]
        a, b = by_name(whole, "train"), by_name(url, "train")
        assert all(np.array_equal(a[n], b[n]) for n in a)
        buckets = -(-453 // 16) + -(-50 // 16)
        assert len(kept) < buckets or name == "scatter" or i == 0

    def test_after_a_crash_between_two_splits_it_resumes(self, tmp_path, monkeypatch):
        arrays = {"x": RNG.normal(size=(N, 100)), "y": LABEL}  # so many constants that they are arrays
        finished = []

        def crashing(url, split, *arguments, **options):
            run(url, split, *arguments, **options)
            finished.append(split)
            raise KeyboardInterrupt

        run = assembly.finish_split
        with monkeypatch.context() as patch:
            patch.setattr(assembly, "finish_split", crashing)
            with pytest.raises(KeyboardInterrupt):
                ingest(arrays, tmp_path / "d")
        assert finished == ["train"]
        url = ingest(arrays, tmp_path / "d")
        mean, _ = Dataset(url, group="validation").normalisation["x"]
        assert_allclose(mean, by_name(url, "train")["x"].astype(float).mean(0), rtol=1e-4, atol=1e-6)

    def test_a_killed_process_leaves_nothing_that_opens(self, tmp_path):
        script = (
            "import os, sys, numpy as np\n"
            "from dask_isgd.pipelines import ingest\n"
            "from dask_isgd.pipelines.ingestion import ingest as ingestion\n"
            "run = ingestion.collect\n"
            "ingestion.collect = lambda plan, i: os.kill(os.getpid(), 9) if i == 2 else run(plan, i)\n"
            "x = np.arange(400.0)\n"
            "ingest({'x': x, 'y': x.astype(int) % 3}, sys.argv[1], memory=400, chunk_size=16)\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "d")], env=environment, timeout=120)
        assert result.returncode == -9
        assert not (tmp_path / "d").exists()
        x = np.arange(400.0)
        url = ingest({"x": x, "y": x.astype(int) % 3}, tmp_path / "d", memory=400, chunk_size=16)
        assert len(Dataset(url)) == 360

    def test_a_dataset_that_is_there_is_used_and_another_is_never_overwritten(self, tmp_path, monkeypatch):
        url = ingest(ARRAYS, tmp_path / "d")
        with monkeypatch.context() as patch:
            patch.setattr(ingestion, "scatter", lambda *_: pytest.fail("done twice"))
            assert ingest(ARRAYS, tmp_path / "d") == url
        with pytest.raises(DataError, match="delete it, or prepare the dataset somewhere else"):
            ingest(ARRAYS, tmp_path / "d", seed=1)
        with pytest.raises(DataError, match="delete it"):
            ingest({**ARRAYS, "image": IMAGE[::-1].copy()}, tmp_path / "d")

    def test_an_identity_takes_the_place_of_the_fingerprint(self, tmp_path, monkeypatch):
        identity = {"name": "mine", "version": 1}
        with monkeypatch.context() as patch:
            self.crash_at(patch, "collect", 0)
            with pytest.raises(KeyboardInterrupt):
                ingest(ARRAYS, tmp_path / "d", identity=identity)
        assert os.listdir(tmp_path) == []
        url = ingest(ARRAYS, tmp_path / "d", identity=identity)
        assert zarr.open_group(url, mode="r").attrs["prepared"] == identity
        assert ingest({**ARRAYS, "image": IMAGE[::-1].copy()}, url, identity=identity) == url
        with pytest.raises(DataError, match=r"'version': 1.*wanted.*'version': 2"):
            ingest(ARRAYS, url, identity={**identity, "version": 2})

    def test_remote(self, tmp_path):
        url = ingest(ARRAYS, f"memory://{tmp_path.name}/d.zarr", scratch=tmp_path / "scratch")
        assert len(Dataset(url)) == 453
        assert os.listdir(tmp_path / "scratch") == []
        assert ingest(ARRAYS, url) == url


class TestRecipe:
    def test_prepare(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        np.savez(tmp_path / "a.npz", x=WIDE, when=np.arange(N), y=LABEL)
        recipe = {
            "source": {"numpy": "a.npz"}, "inputs": ["x"], "target": "y", "time": "when", "chunk-size": 32,
            "splits": {"train": 0.8, "test": 0.2},
        }  # fmt: skip
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        result = CliRunner().invoke(isgd, ["prepare", "mine.yaml"])
        assert (result.exit_code, result.stdout) == (0, "data/mine.zarr\n"), result.output
        data = Dataset("data/mine.zarr")
        assert (len(data), data.chunk_size, data.classes) == (403, 32, 7)
        assert CliRunner().invoke(isgd, ["prepare", "mine.yaml", "--to", "other.zarr"]).stdout == "other.zarr\n"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[1, 2]", "wanted 'source:'"),
            ("source: a.nc", "wanted 'source:'"),
            (
                "{source: {numpy: a.npz}, traget: y, shufle: no}",
                "(?s)'shufle'; did you mean 'shuffle'.*'traget'; did you mean 'target'",
            ),
            ("source: {", "is not YAML"),
            ("{source: {numpy: nowhere.npz}}", "cannot be read by numpy"),
        ],
    )
    def test_mistakes(self, tmp_path, content, message):
        (tmp_path / "r.yaml").write_text(content)
        result = CliRunner().invoke(isgd, ["prepare", str(tmp_path / "r.yaml")])
        assert result.exit_code == 1
        assert re.search(message, result.stderr)

    def test_a_file_that_is_not_there(self):
        result = CliRunner().invoke(isgd, ["prepare", "nowhere.yaml"])
        assert result.exit_code == 2
        assert "there is no file 'nowhere.yaml'" in result.output
