"""Whatever is in a file that is ingested, and in the recipe that says how: an error of the library, or a dataset."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from damage import damaged_bytes, damaged_json, damaged_yaml
from fuzzing import COMMANDS, EXAMPLES, RUNNING_CODE, fuzzed, make_plain, only_our_errors, read_yaml_file
from hypothesis import given
from matplotlib.image import imsave
from scipy.io import savemat

from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.pipelines.datasets.matlab import open_variable
from dask_isgd.pipelines.ingestion.recipe import ingest_recipe


def make_sources(root: Path) -> dict[str, dict[str, Any]]:
    """Write a file of each kind that can be ingested; return a recipe for each kind."""
    x, y = np.ones((12, 3), np.float32), np.arange(12) % 2
    np.savez(root / "rows.npz", x=x, y=y)
    np.save(root / "x.npy", x)
    np.save(root / "y.npy", y)
    frame = pd.DataFrame({"a": x[:, 0], "b": [*"uvw"] * 4, "y": y})
    frame.to_parquet(root / "rows.parquet")
    frame.to_csv(root / "rows.csv", index=False)
    make_plain(root / "plain.zarr")
    make_plain(root / "rows.zarr")
    for name, dimensions in {"x": ["sample", "k"], "y": ["sample"]}.items():
        (root / "rows.zarr" / name / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": dimensions}))
    for i in range(4):
        (root / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        imsave(root / "images" / f"class{i % 2}" / f"{i}.png", np.full((5, 5, 3), 10 * i, np.uint8))
    rest = {"splits": {"train": 0.5, "validation": 0.5}, "seed": 3, "chunk_size": 4, "memory": "1MB"}
    return {
        "npz": {"source": {"numpy": str(root / "rows.npz")}, "target": "y", **rest},
        "npy": {"source": {"numpy": {k: str(root / f"{k}.npy") for k in "xy"}}, "dtypes": {"x": "f4"}, **rest},
        "parquet": {"source": {"parquet": str(root / "rows.parquet")}, "features": {"f": ["a"]}, "target": "y", **rest},
        "csv": {"source": {"csv": str(root / "rows.csv")}, "features": ["a", "b"], "target": "y", "mask": True, **rest},
        "images": {"source": {"images": str(root / "images"), "size": [4, 4], "mode": "L"}, **rest},
        "plain zarr": {"source": {"zarr": str(root / "plain.zarr")}, "target": "y", "inputs": ["x"], **rest},
        "zarr": {"source": {"xarray": str(root / "rows.zarr")}, "target": "y", "normalise": "auto", **rest},
    }


SOURCES = {
    "npz": "rows.npz",
    "npy": "x.npy",
    "parquet": "rows.parquet",
    "csv": "rows.csv",
    "images": "images/class0/0.png",
    "plain zarr": "plain.zarr/x/.zarray",
    "zarr": "rows.zarr/x/.zarray",
}


def ingested(folder: Path, content: bytes, name: str) -> None:
    forbidden = COMMANDS if name in ("parquet", "csv") else RUNNING_CODE  # dask.dataframe pickles its own expressions
    made = folder / "made.zarr"
    shutil.rmtree(made, ignore_errors=True)
    read_yaml_file(folder, content, lambda path: ingest_recipe(path, str(made)), forbidden)


@pytest.mark.parametrize("name", SOURCES)
def test_ingestion_recipes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = make_sources(tmp_path)[name]

    @fuzzed(EXAMPLES * 3 // 5)
    @given(damaged_yaml(yaml.safe_dump(recipe)))
    def check(content):
        ingested(tmp_path, content, name)

    check()


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_sources(name, tmp_path):
    recipe, path = json.dumps(make_sources(tmp_path)[name]).encode(), tmp_path / SOURCES[name]
    pristine = path.read_bytes()

    @fuzzed(EXAMPLES * 3 // 5)
    @given(damaged_json(pristine) if path.name == ".zarray" else damaged_bytes(pristine))
    def check(content):
        path.write_bytes(content)
        ingested(tmp_path, recipe, name)

    check()


PIXELS = np.ones((3, 4, 7), np.uint8)


def read_mat(path: Path) -> None:
    with path.open("rb") as file:
        variable = open_variable(file, path, "X")
        while variable is not None and len(variable.read(5)):
            pass


def save_idx(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\0\0\x08\x02" + np.array([4, 3], ">u4").tobytes() + bytes(12)))


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (
            lambda path: savemat(path, {"a": np.ones(3), "X": np.ones((3, 4, 7), np.uint8)}, do_compression=True),
            read_mat,
        ),
        (lambda path: savemat(path, {"X": np.ones((3, 4, 7), np.uint8)}), read_mat),
        (save_idx, read_idx),
    ],
    ids=["mat", "plain mat", "idx"],
)
def test_damaged_downloads(make, read, tmp_path):
    path = tmp_path / "file.mat"
    make(path)

    @fuzzed()
    @given(damaged_bytes(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        with only_our_errors():
            read(path)

    check()
