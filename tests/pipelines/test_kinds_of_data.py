"""Whatever a user holds becomes a dataset, row by row: objects in memory, plain Zarr, files recognised by name."""

from __future__ import annotations

import json

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from click.testing import CliRunner
from numpy.testing import assert_array_equal

from dask_isgd.errors import DataError, EmptyDatasetError, LengthMismatchError
from dask_isgd.pipelines import ingest
from dask_isgd.pipelines.cli import isgd
from dask_isgd.storage import Dataset

N = 101
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 3)).astype("f4")
T = RNG.integers(0, 50, (N, 4))
Y = RNG.integers(0, 5, N)
FRAME = pd.DataFrame({"a": X[:, 0], "b": T[:, 0], "row": np.arange(N), "target": Y})

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dask's use of pandas


class Pairs(torch.utils.data.Dataset):
    """A map-style dataset that makes its items when asked."""

    classes = ["v", "w", "x", "y", "z"]  # noqa: RUF012

    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.from_numpy(X[i]), int(Y[i])


class Mappings(Pairs):
    def __getitem__(self, i):
        return {"x": X[i], "y": Y[i]}


class HuggingFace:
    """What a `datasets.Dataset` does as far as its columns are concerned; the real one is tried if it is installed."""

    def __init__(self, columns):
        self.columns, self.column_names, self.features = columns, list(columns), {}

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def with_format(self, kind):
        assert kind == "numpy"
        return self

    def select_columns(self, names):
        return HuggingFace({name: self.columns[name] for name in names})

    def __getitem__(self, rows):
        return {name: values[rows] for name, values in self.columns.items()}


def plain(folder, *, zarr_format=3, chunks=(7, 10)):
    """A group as other programs write it: no names of dimensions, arrays chunked differently."""
    group = zarr.open_group(folder, mode="w", zarr_format=zarr_format)
    for (name, values), rows in zip({"x": X, "y": Y}.items(), chunks, strict=True):
        made = group.create_array(name, shape=values.shape, chunks=(rows, *values.shape[1:]), dtype=values.dtype)
        made[...] = values
    return group


SOURCES = {
    "tuple of arrays": lambda _: (X, Y),
    "tuple of tensors": lambda _: (torch.from_numpy(X), torch.from_numpy(Y)),
    "tuple of Zarr arrays": lambda folder: tuple(array for _, array in sorted(plain(folder).arrays())),
    "tuple of Dask arrays": lambda _: (da.from_array(X, chunks=(30, 2)), da.from_array(Y, chunks=17)),
    "mapping of lists": lambda _: {"x": X.tolist(), "y": Y.tolist()},
    "mapping of data arrays": lambda _: dict(xr.Dataset({"x": (("sample", "p"), X), "y": ("sample", Y)}).data_vars),
    "xarray": lambda _: xr.Dataset({"x": (("sample", "p"), X), "y": ("sample", Y)}),
    "tensor dataset": lambda _: torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
    "map-style dataset": lambda _: Pairs(),
    "subset": lambda _: torch.utils.data.Subset(Pairs(), range(N)),
    "map-style dataset of mappings": lambda _: Mappings(),
    "hugging face": lambda _: HuggingFace({"x": X, "y": Y}),
    "zarr group": lambda folder: plain(folder),
    "zarr path": lambda folder: plain(folder / "p.zarr") and folder / "p.zarr",
    "zarr v2 path": lambda folder: plain(folder / "p.zarr", zarr_format=2) and str(folder / "p.zarr"),
    "zarr in a recipe": lambda folder: plain(folder) and {"zarr": str(folder)},
    "zarr arrays by path": lambda folder: plain(folder) and {"zarr": {"x": str(folder / "x"), "y": str(folder / "y")}},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_row_with_its_target(tmp_path, kind):
    source = SOURCES[kind](tmp_path / "source")
    url = ingest(source, tmp_path / "d", splits={"train": np.arange(N)}, normalise="none")
    data = Dataset(url)
    assert (data.input_names, data.target_name) == (("x",), "y")
    rows = data.load()
    assert_array_equal(rows.inputs[0], X)
    assert_array_equal(rows.target, Y)
    assert data.classes == 5


FRAMES = {
    "pandas": lambda _: FRAME,
    "dask": lambda _: dd.from_pandas(FRAME, npartitions=3),
    "parquet": lambda folder: FRAME.to_parquet(folder / "t.parquet") or folder / "t.parquet",
    "csv": lambda folder: FRAME.to_csv(folder / "t.csv", index=False) or str(folder / "t.csv"),
    "csv in a recipe": lambda folder: (
        FRAME.to_csv(folder / "t.txt", index=False, sep=";") or {"csv": str(folder / "t.txt"), "sep": ";"}
    ),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_the_numbers_of_a_frame_are_stacked_and_normalised(tmp_path, kind):
    data = Dataset(ingest(FRAMES[kind](tmp_path), tmp_path / "d", splits={"train": 0.8, "test": 0.2}))
    assert data.input_names == ("features",)
    rows = data.load()
    place = rows.inputs[0][:, 2].astype(int)
    np.testing.assert_allclose(rows.inputs[0], FRAME[["a", "b", "row"]].to_numpy()[place], rtol=1e-6)
    assert_array_equal(rows.target, Y[place])
    mean, std = data.normalisation["features"]
    np.testing.assert_allclose(mean, rows.inputs[0].astype(float).mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, rows.inputs[0].astype(float).std(0), rtol=1e-5)
    assert data.attributes["features"] == {"features": ["a", "b", "row"]}


def test_a_hugging_face_dataset_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"tokens": T.tolist(), "label": Y.tolist()})
    made = made.cast_column("label", datasets.ClassLabel(names=[*"vwxyz"]))
    data = Dataset(ingest(made, tmp_path / "d", inputs="tokens", splits={"train": np.arange(N)}))
    assert_array_equal(data.load().inputs[0], T)
    assert data.attributes["class_names"] == [*"vwxyz"]
    with pytest.raises(DataError, match=r"source\['train'\]"):
        ingest(datasets.DatasetDict({"train": made}), tmp_path / "e")


def test_classes_of_a_map_style_dataset_have_names(tmp_path):
    assert Dataset(ingest(Pairs(), tmp_path / "d")).attributes["class_names"] == Pairs.classes


def test_several_inputs_of_a_tuple(tmp_path):
    data = Dataset(ingest((X, T, Y), tmp_path / "d"))
    assert (data.input_names, data.target_name) == (("x0", "x1"), "y")


class TestPlainZarr:
    def test_arrays_with_named_dimensions_are_read_by_xarray(self, tmp_path):
        made = xr.Dataset({"x": (("p", "time"), X.T), "y": ("time", Y)})
        made["x"].encoding = {"dtype": "i2", "scale_factor": 0.01, "_FillValue": -9999}
        made.to_zarr(tmp_path / "s.zarr", zarr_format=2, consolidated=True)
        url = ingest(tmp_path / "s.zarr", tmp_path / "d", dimension="time", splits={"train": np.arange(N)})
        np.testing.assert_allclose(Dataset(url).load().inputs[0], X, atol=0.006)

    def test_arrays_of_other_lengths_are_named_or_left_out(self, tmp_path):
        plain(tmp_path / "s").create_array("lat", shape=(4,), dtype="f4")[...] = 1
        with pytest.raises(LengthMismatchError, match=r"'lat': 4.*inputs=.*target="):
            ingest(tmp_path / "s", tmp_path / "d")
        assert Dataset(ingest(tmp_path / "s", tmp_path / "d", inputs="x", target="y")).input_names == ("x",)

    def test_missing_chunks_are_announced(self, tmp_path, caplog):
        group = plain(tmp_path / "s")
        group["x"][:14] = 0.0  # two chunks of zeros, which are not written
        url = ingest(tmp_path / "s", tmp_path / "d", splits={"train": np.arange(N)}, normalise="none")
        assert "2 of the 15 chunks of array 'x' are not in the store, and are read as 0.0" in caplog.text
        assert not Dataset(url).load().inputs[0][:14].any()

    def test_chunks_that_do_not_have_the_shape_of_the_metadata(self, tmp_path):
        made = zarr.open_group(tmp_path / "s", mode="w", zarr_format=2)
        for name, shape in (("x", (10, 3)), ("y", (10,))):
            made.create_array(name, shape=shape, chunks=(4, *shape[1:]), dtype="f4")[...] = 1
        metadata = json.loads((tmp_path / "s/x/.zarray").read_text()) | {"compressor": None}
        (tmp_path / "s/x/.zarray").write_text(json.dumps(metadata))
        with pytest.raises(DataError, match=r"array 'x', rows 0 to \d+: cannot be read .*is the file complete"):
            ingest(tmp_path / "s", tmp_path / "d")

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            (lambda f: f / "nothing.zarr", DataError, "there is no Zarr; check the path"),
            (lambda f: plain(f / "s") and f / "s" / "x", DataError, r"single array.*zarr: \{x: one.zarr"),
            (
                lambda f: (zarr.open_group(f / "s").create_group("a"), f / "s")[1],
                EmptyDatasetError,
                "groups in it: 'a'",
            ),
            (lambda f: plain(f / "s") and {"zarr": str(f / "s"), "group": "b"}, DataError, "group 'b'.*no Zarr"),
            (lambda f: plain(f / "s") and {"zarr": str(f / "s"), "grup": "b"}, DataError, "grup"),
        ],
    )
    def test_places_that_are_wrong(self, tmp_path, source, error, message):
        with pytest.raises(error, match=message):
            ingest(source(tmp_path), tmp_path / "d")

    def test_the_error_about_uneven_chunks_names_a_command_that_works(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        plain(tmp_path / "s.zarr")
        with pytest.raises(DataError, match=r"'x': 7, 'y': 10.*`(dask isgd prepare .*)`") as caught:
            Dataset(tmp_path / "s.zarr")
        command = str(caught.value).split("`")[1].split()
        result = CliRunner().invoke(isgd, command[2:])
        assert result.exit_code == 0, result.output
        assert Dataset(result.stdout.strip()).input_names == ("x",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (X, "got a single ndarray, wanted inputs and a target"),
        (torch.from_numpy(X), "got a single Tensor"),
        ((X,), "got tuple of 1, wanted inputs and a target"),
        (iter([1]), "wanted an xarray.Dataset, a mapping or tuple"),
        (pd.Series([1, 2]), "got Series, wanted a frame"),
        ("a.txt", r"a\.txt, wanted \.zarr.*name the kind"),
        ((da.from_array(X)[da.from_array(Y) > 1], Y), "unknown length; call its compute_chunk_sizes"),
        (HuggingFace({"x": [[1], [1, 2]], "y": [0, 1]}), r"'x': got values of shapes \[\(1,\), \(2,\)\]"),
        (pd.DataFrame(np.ones((3, 2)), columns=["a", "a"]), "a different name for each"),
    ],
)
def test_sources_that_are_wrong(tmp_path, source, message):
    with pytest.raises(DataError, match=message):
        ingest(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_items_of_different_shapes(tmp_path):
    class Ragged(Pairs):
        def __getitem__(self, i):
            return X[i][: 3 - (i == 7)], int(Y[i])

    with pytest.raises(DataError, match=r"item 7 of Ragged: got float32\[2\] for 'x', wanted float32\[3\]"):
        ingest(Ragged(), tmp_path / "d")


@pytest.mark.parametrize(("rows", "size"), [(10, 64), (3_200, 64), (64_000, 1000), (10**6, 8192)])
def test_chunks_are_many_enough_for_scorers(rows, size):
    from dask_isgd.pipelines.ingestion.ingest import _chunk_rows

    assert _chunk_rows(rows, row_bytes=8) == size
    assert _chunk_rows(rows, row_bytes=1 << 20) == 2
