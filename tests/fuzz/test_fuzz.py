"""Whatever is in a file that the library reads, it raises its own error or reads it: never another error, never a hang,
never code.

CI tries some 700 inputs, the same ones each time; ``scripts/fuzz HOURS`` tries new ones for a night.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from damage import damaged_bytes, damaged_json, damaged_yaml
from fuzzing import EXAMPLES, fuzzed, make_plain, only_our_errors, read_yaml_file
from hypothesis import given
from hypothesis import strategies as st

from dask_isgd.clusters import load_cluster
from dask_isgd.pipelines.commands import show
from dask_isgd.pipelines.recipes import load_recipe
from dask_isgd.storage import Dataset, RunDirectory, write_dataset


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
