"""The JSON schemas of docs/schemas: they are current and agree with the library."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dask_isgd.clusters.cluster_file import cluster_from_mapping
from dask_isgd.clusters.jobqueue import QUEUES
from dask_isgd.errors import ConfigError
from dask_isgd.pipelines import PIPELINES
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.pipelines.ingestion.recipe import IngestRecipe
from dask_isgd.pipelines.recipes import recipe_from_mapping
from dask_isgd.validation import Places, validate
from dask_isgd.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "schemas"
RECIPES = {name: pipeline.recipe for name, pipeline in PIPELINES.items()}
READ: dict[str, Any] = {
    "recipe": lambda values: recipe_from_mapping(values, RECIPES),
    "cluster": cluster_from_mapping,
    "ingest": lambda values: validate(IngestRecipe, values, Places()),
}
EXAMPLES = [
    *(("cluster", path) for path in sorted((ROOT / "examples" / "clusters").glob("*.yaml"))),
    *(("recipe", path) for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))),
    *(("ingest", path) for path in sorted((ROOT / "examples" / "ingest").glob("*.yaml"))),
]
JOB = {"cores": 1, "memory": "1GB"}


def fits(name: str, values: Any) -> bool:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return not list(jsonschema.Draft202012Validator(schema).iter_errors(values))


def test_they_are_current(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "schemas", tmp_path], check=True, timeout=120, env=os.environ)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in FOLDER.iterdir()}, "run scripts/schemas"


@pytest.mark.parametrize(("name", "path"), EXAMPLES, ids=lambda value: getattr(value, "name", value))
def test_every_example_fits_and_names_its_schema(name, path):
    text = path.read_text()
    schema = text.partition("\n")[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == FOLDER / f"{name}.schema.json"
    assert fits(name, yaml.safe_load(text))
    READ[name](read_yaml(path, "an example"))


@pytest.mark.parametrize(
    ("name", "values", "right"),
    [
        ("recipe", {"data": "digits"}, True),
        ("recipe", {"data": "digits", "learning": {"batch_size": 3, "clip-norm": None}}, True),
        ("recipe", {"data": "digits", "learning": {"steps": -1}}, False),
        ("recipe", {"data": "digits", "learning": {"step": 1}}, False),
        ("recipe", {"data": "digits", "sampling": {"gate": "ajar"}}, False),
        ("recipe", {"data": "digits", "scoring": {"resources": {"scorer": 0}}}, False),
        ("recipe", {}, False),
        ("cluster", {"cluster": "local", "scorers": {"maximum": 3}, "gpus": [0, "GPU-1"]}, True),
        ("cluster", {"cluster": "local", "security": "temporary"}, True),
        ("cluster", {"cluster": "local", "security": {"ca-file": "a", "cert": "b", "key": "c"}}, True),
        ("cluster", {"cluster": "local", "security": "none"}, False),
        ("cluster", {"cluster": "local", "job": JOB}, False),
        ("cluster", {"cluster": "slurm", "job": {**JOB, "walltime": 14400}}, False),
        ("cluster", {"cluster": "slurm", "job": {**JOB, "worker_extra_args": ["--x"], "job-cpu": 3}}, True),
        ("cluster", {"cluster": "lokal"}, False),
        ("cluster", {"cluster": "local", "scorers": None}, False),
        *(("cluster", {"cluster": kind, "job": JOB}, True) for kind in QUEUES if kind != "htcondor"),
        ("cluster", {"cluster": "htcondor", "job": {**JOB, "disk": "1GB"}}, True),
        ("ingest", {"source": {"numpy": "a.npz"}, "chunk-size": 3, "chunk_size": 3, "normalise": {"x": "all"}}, True),
        ("ingest", {"source": {"numpy": "a.npz"}, "inputs": "x", "memory": 10**9, "classify": None}, True),
        ("ingest", {"source": {}}, False),
        ("ingest", {"source": {"numpy": "a.npz"}, "missing": "drop", "features": ["a"]}, True),
        ("ingest", {"source": {"zarr": {"x": "a", "y": "b"}}, "missing": {"a": 0, "b": "mean"}, "mask": True}, True),
        ("ingest", {"source": {"numpy": "a.npz"}, "missing": "ignore"}, False),
        ("ingest", {"source": {"numpy": "a.npz"}, "features": "a"}, False),
        ("ingest", {"source": {"numpy": "a.npz"}, "splits": {}}, False),
        ("ingest", {"source": {"numpy": "a.npz"}, "shuffle": "no"}, False),
    ],
)  # fmt: skip
def test_editors_and_the_library_agree(name, values, right):
    assert fits(name, values) == right
    if right:
        READ[name](values)
    else:
        with pytest.raises(ConfigError):
            READ[name](values)


def test_an_ingest_recipe_has_the_arguments_of_ingest():
    arguments = inspect.signature(ingest).parameters
    fields = IngestRecipe.model_fields
    assert set(arguments) - set(fields) <= {"url", "client", "identity"}
    assert set(fields) - set(arguments) == {"to"}
    same = {name: fields[name].default for name in set(fields) & set(arguments) - {"source"}}
    assert same == {name: arguments[name].default for name in same}
