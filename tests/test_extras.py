"""What is optional: each package belongs to an extra, and a missing one is a sentence with the command."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dask_isgd import display
from dask_isgd.callbacks import MLflow, TensorBoard, WandB
from dask_isgd.errors import MissingExtraError
from dask_isgd.pipelines.commands.train import _plot
from dask_isgd.pipelines.ingestion.tables.opening import open_table
from dask_isgd.run.hardest import png
from dask_isgd.storage import Dataset
from dask_isgd.storage.backends.stores import open_folder

ROOT = Path(__file__).parents[1]
FOLDERS = ("dask_isgd", "storage", "pipelines")
FOR_DEVELOPERS = {"test", "bench"}
BY_NAME = {
    "accelerate",
    "aiohttp",
    "icechunk",
    "h5py",
    "dask-cuda",
    "mlflow-skinny",
    "prometheus-client",
    "tensorboard",
    "transformers",
    "wandb",
}
"""Imported by a library that is, or by a name that is a text."""
BROUGHT_ALONG = {
    "botocore": "the errors of boto3",
    "ipython": "imported only in a notebook, which has it",
    "pydantic-core": "a part of pydantic, which pins its version",
    "tornado": "a part of distributed's interface",
}


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)["project"]
    return found


def names(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=~! ;]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Return the top-level names of the modules that the library imports anywhere."""
    found: set[str] = set()
    for file in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"dask_isgd"}


def test_every_package_that_is_imported_is_declared_and_every_declared_one_is_imported():
    found, distributions = project(), packages_distributions()
    core = names(found["dependencies"])
    users = {k: v for k, v in found["optional-dependencies"].items() if k not in FOR_DEVELOPERS}
    optional = set().union(*(names(requirements) for requirements in users.values())) - {"dask-isgd"}
    used = {normal(d) for module in imported() for d in distributions.get(module, [module])}
    assert used - core - optional == BROUGHT_ALONG.keys()
    assert core - used == set()
    assert core & optional == set()
    assert optional - used - BY_NAME == set()


def test_all_holds_every_extra_but_those_that_choose_versions_or_are_frameworks_of_their_own():
    extras = project()["optional-dependencies"]
    (everything,) = extras["all"]
    listed = set(re.findall(r"[a-z0-9]+", everything.partition("[")[2]))
    assert listed == extras.keys() - FOR_DEVELOPERS - {"all", "cuda", "lightning", "transformers"}


def plot() -> None:
    sys.modules.pop("dask_isgd.display.plots", None)
    importlib.import_module("dask_isgd.display.plots")


def queue() -> None:
    from dask_isgd.clusters import SLURMCluster  # noqa: F401


@pytest.fixture
def netcdf(tmp_path: Path) -> str:
    path = tmp_path / "weather.nc"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    return str(path)


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("matplotlib.axes", "plot", plot),
        ("PIL", "images", lambda: png(np.zeros((8, 8), np.uint8))),
        ("pyarrow", "parquet", lambda: open_table({"parquet": __file__})),
        ("dask_jobqueue", "jobqueue", queue),
        ("obstore", "s3", lambda: open_folder("s3://bucket/run")),
        ("obstore", "gcs", lambda: Dataset("gs://bucket/data.zarr")),
        ("obstore", "azure", lambda: open_folder("az://container/run")),
        ("boto3", "s3", lambda: open_folder("s3://bucket/run")),
        ("tensorboard", "tensorboard", lambda: TensorBoard("logs")),
        ("mlflow", "mlflow", MLflow),
        ("wandb", "wandb", WandB),
    ],
)
def test_a_missing_extra_is_one_sentence_with_its_command(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str, use: Callable[[], Any]
):
    monkeypatch.setitem(sys.modules, module, None)
    for child in ("exceptions", "store"):
        monkeypatch.delitem(sys.modules, f"{module}.{child}", raising=False)
    with pytest.raises(MissingExtraError) as caught:
        use()
    package = module.partition(".")[0]
    assert str(caught.value).endswith(f" needs {package}, which is not installed: pip install 'dask_isgd[{extra}]'")
    assert "\n" not in str(caught.value)


def test_netcdf_without_a_reader(monkeypatch: pytest.MonkeyPatch, netcdf: str):
    import xarray

    monkeypatch.setattr(xarray.backends, "list_engines", dict)
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    with pytest.raises(MissingExtraError, match=r"weather.nc needs h5netcdf, .*pip install 'dask_isgd\[netcdf\]'"):
        open_table({"xarray": netcdf})


def test_a_run_without_matplotlib_ends_with_that_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "dask_isgd.display.plots", raising=False)  # so that it is imported again
    monkeypatch.delattr(display, "plots", raising=False)
    assert _plot(None, "run") == (  # type: ignore[arg-type]
        "no plot saved: a plot needs matplotlib, which is not installed: pip install 'dask_isgd[plot]'"
    )


def test_training_and_watching_need_no_optional_package():
    """Everything that `dask isgd train digits` and the client of `fit` import."""
    blocked = "matplotlib pyarrow h5netcdf sklearn scipy obstore boto3 aiohttp dask_jobqueue dask_cuda"
    code = (
        f"import sys\nfor name in {blocked.split()!r}: sys.modules[name] = None\n"
        "import dask_isgd as isgd, importlib\n"
        "for name in isgd.__all__: getattr(isgd, name)\n"
        "from dask_isgd.clusters import load_cluster\n"
        "for name in ('learner.task', 'scorer.task', 'coordinator.task', 'pipelines.commands.train',"
        " 'pipelines.commands.show', 'pipelines.datasets.digits', 'dashboard.pages', 'pipelines.ingestion.ingest'):\n"
        "    importlib.import_module('dask_isgd.' + name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
