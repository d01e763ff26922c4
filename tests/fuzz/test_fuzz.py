"""Whatever is in a file that the library reads, it raises its own error or reads it: never another error, never a hang,
never code.

CI tries some 700 inputs, the same ones each time; ``scripts/fuzz HOURS`` tries new ones for a night.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
import zarr
from damage import damaged_bytes, damaged_json, damaged_yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matplotlib.image import imsave
from scipy.io import savemat

from dask_isgd.clusters import load_cluster
from dask_isgd.errors import IsgdError
from dask_isgd.pipelines.commands import show
from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.pipelines.datasets.matlab import open_variable
from dask_isgd.pipelines.ingestion.recipe import ingest_recipe
from dask_isgd.pipelines.recipes import load_recipe
from dask_isgd.storage import Dataset, RunDirectory, write_dataset

EXAMPLES = int(os.environ.get("ISGD_FUZZ_EXAMPLES", "25"))
"""Inputs per kind of file."""
LIMIT = timedelta(seconds=20)
COMMANDS = frozenset(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"))
RUNNING_CODE = COMMANDS | {"pickle.find_class"}
_watched: frozenset[str] = frozenset()


class CodeRanError(BaseException):
    """A file ran code."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _watched:
        raise CodeRanError(event, arguments)


sys.addaudithook(_audit)


@contextmanager
def only_our_errors(forbidden: frozenset[str] = RUNNING_CODE) -> Iterator[None]:
    """Let an IsgdError pass, and nothing else."""
    global _watched
    former, _watched = _watched, forbidden
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library about the file: it may warn
            yield
    except IsgdError:
        pass
    finally:
        _watched = former


# What is read -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A kind of file: what makes a folder with it, its names in there, and everything that reads it."""

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], None]


def make_run(root: Path) -> None:
    directory = RunDirectory(root)
    config = {"learning": {"steps": 100}, "sampling": {"uniform": False}}
    model = {"name": "m:n", "signature": {"weight": [[2, 3], "float32"]}}
    directory.create({"run": "r", "config": config, "data": {"arrays": {}}, "model": model, "chunk": 4, "created": 1.5})
    directory.create_weights(10, 4).write(0, np.arange(4))
    directory.open_weights().write_stamps([[7, 1, 1e9], [np.nan] * 3, [np.nan] * 3])
    attrs = {"incarnation": 1, "start_step": 0}
    history = directory.create_history("learner-0001", ["loss", "seconds"], 8, attrs=attrs)
    history.append({"step": 10, "loss": 0.5, "seconds": 2.0})
    history.flush()
    for step in (10, 20):
        directory.checkpoints().commit(step, 1, {"model.w": np.ones((2, 3), "f4")}, {"run": "r", "seconds": 1.0})
    directory.leases().acquire({"host": "h"})
    directory.set_control(want="run", attempt=5)


def read_run(root: Path) -> None:
    directory = RunDirectory(root)
    for read in (
        lambda: directory.document("run", "chunk", "created", "data", "model", "config.learning.steps"),
        lambda: show.read_progress(str(root)).state,
        directory.control,
        directory.attempt,
        lambda: directory.set_control(want="stop", attempt=9),
        lambda: directory.checkpoints().latest("r"),
        lambda: directory.checkpoints().latest_manifest(),
        lambda: directory.leases().owner(1),
        lambda: directory.acquire_lease("learner", {}),
        lambda: directory.open_weights().read_all(),
        lambda: directory.open_weights().read_stamps(),
        lambda: directory.open_weights().read(1),
        lambda: directory.read_history().load(),
        lambda: directory.repair_weights(10, 4),
    ):
        with only_our_errors():
            read()
    directory.open_weights().read_all()  # repaired


def make_dataset(root: Path) -> None:
    arrays = {"x": np.ones((10, 70), np.float32), "y": np.arange(10) % 3}
    constants = {"x": {"mean": np.zeros(70), "std": np.ones(70)}}
    roles: dict[str, Any] = {"inputs": "x", "target": "y", "classes": 3, "normalisation": constants}
    for split in ("train", "validation"):
        write_dataset(root, split, arrays, chunk_size=4, compressed=True, **roles)


def make_plain(root: Path) -> None:
    """Not of this library's making: format 2, and nothing consolidated."""
    group = zarr.open_group(root, mode="w", zarr_format=2)
    for name, values in {"x": np.ones((10, 3), "f4"), "y": np.arange(10) % 3}.items():
        group.create_array(name, data=values, chunks=(4, *values.shape[1:]))


def read_dataset(root: Path) -> None:
    with only_our_errors():
        dataset = Dataset(root)
        assert repr(dataset)
        for read in (
            lambda: dataset.check(),
            lambda: dataset.normalisation,
            lambda: dataset.fingerprint(),
            lambda: dataset.rows([0, 5, len(dataset) - 1]),
            lambda: dataset.raw,
            lambda: dataset.split("validation"),
            lambda: dataset.load(),
        ):
            with only_our_errors():
                read()


DOCUMENTS = ("run.json", "control.json", "leases/learner-0001.json")
CHECKPOINT = ("checkpoints/step-000000020-i0001/manifest.json",)
METADATA = ("weights.zarr/zarr.json", "weights.zarr/weight/zarr.json", "weights.zarr/stamp/zarr.json")
REPORTS = ("zarr.json", "learner-0001/zarr.json", "learner-0001/reports/zarr.json")
SPLIT = ("zarr.json", "train/zarr.json", "train/x/zarr.json", "train/y/zarr.json", "train/x_mean/zarr.json")
TARGETS = {
    "documents": Target(make_run, DOCUMENTS, read_run),
    "checkpoints": Target(make_run, CHECKPOINT, read_run),
    "weights": Target(make_run, METADATA, read_run),
    "history": Target(make_run, tuple(f"history.zarr/{name}" for name in REPORTS), read_run),
    "dataset": Target(make_dataset, SPLIT, read_dataset),
    "plain dataset": Target(make_plain, (".zgroup", "x/.zarray", "y/.zarray", "x/.zattrs"), read_dataset),
}
CHUNKS = {
    "run": Target(
        make_run,
        (
            "checkpoints/step-000000020-i0001/tensors.safetensors",
            "weights.zarr/weight/c/0",
            "weights.zarr/stamp/c/0/0",
            "history.zarr/learner-0001/reports/c/0/0",
        ),
        read_run,
    ),
    "dataset": Target(make_dataset, ("train/x/c/0/0", "train/y/c/1"), read_dataset),
}


def fuzzed(examples: int = EXAMPLES) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=LIMIT,
        derandomize="ISGD_FUZZ_EXAMPLES" not in os.environ,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@pytest.fixture
def damaging(tmp_path):
    """Write a damaged file into a copy of what a target makes, and read it."""

    def damage(target: Target, data: st.DataObject, strategy: Callable[[bytes], st.SearchStrategy[bytes]]) -> None:
        pristine, copy = tmp_path / "pristine", tmp_path / "copy"
        if not pristine.exists():
            target.make(pristine)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(pristine, copy)
        path = copy / data.draw(st.sampled_from(target.files), label="file")
        path.write_bytes(data.draw(strategy(path.read_bytes()), label="content"))
        target.read(copy)

    return damage


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_documents(name, damaging):
    @fuzzed(2 * EXAMPLES)
    @given(st.data())
    def check(data):
        damaging(TARGETS[name], data, damaged_json)

    check()


@pytest.mark.parametrize("name", CHUNKS)
def test_damaged_chunks(name, damaging):
    @fuzzed()
    @given(st.data())
    def check(data):
        damaging(CHUNKS[name], data, damaged_bytes)

    check()


CLUSTERS = {
    "local": {"cluster": "local", "scorers": {"minimum": 1, "maximum": 4}, "gpus": [0, "1"], "security": "temporary"},
    "scheduler": {
        "cluster": "scheduler",
        "address": "tcp://10.0.0.1:8786",
        "wait": "5 minutes",
        "dask": {"a": 1},
    },
    "slurm": {
        "cluster": "slurm",
        "scorers": 3,
        "job": {"cores": 4, "memory": "8GB", "walltime": "01:00:00", "job-extra-directives": ["-x"]},
        "learner": {"cores": 8, "lifetime": "50 minutes"},
        "scheduler": {"interface": "eth0", "port": 0},
    },
}
RECIPE = {
    "data": "fashion-mnist",
    "model": "dask_isgd.pipelines.models:fashion_mnist",
    "learning": {"steps": 40, "learning_rate": 0.02, "cache_memory": "1GB", "optimizer": "torch.optim:Adam"},
    "scoring": {"method": "exact", "resources": {"scorer": 1}, "timeout": "10 minutes"},
    "sampling": {"gate": "open", "smoothing": 0.3, "half_life_steps": 100},
    "validation": "test",
}


def read_yaml_file(
    folder: Path, content: bytes, read: Callable[[Path], Any], forbidden: frozenset[str] = RUNNING_CODE
) -> None:
    path = folder / "file.yaml"
    path.write_bytes(content)
    with only_our_errors(forbidden):
        read(path)


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_files(name, tmp_path):
    @fuzzed()
    @given(damaged_yaml(yaml.safe_dump(CLUSTERS[name])))
    def check(content):
        read_yaml_file(tmp_path, content, load_cluster)

    check()


def test_recipes(tmp_path):
    @fuzzed()
    @given(damaged_yaml(yaml.safe_dump(RECIPE)))
    def check(content):
        read_yaml_file(tmp_path, content, load_recipe)

    check()


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
