"""One small dataset and one cluster of processes for the tests that train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client

import dask_isgd as isgd
from dask_isgd.pipelines import PIPELINES
from dask_isgd.storage import Dataset

MODEL = "dask_isgd.pipelines.models:digits"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The training split of the digits."""
    url = PIPELINES["digits"].prepare(str(tmp_path_factory.mktemp("data") / "digits.zarr"))
    return Dataset(url, group="train")


@pytest.fixture(scope="module", autouse=True)
def no_default_client() -> Iterator[None]:
    """Dask's own scheduler to begin with: a client that could not connect stays the default until it is collected."""
    with dask.config.set(scheduler=None):
        yield


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of a learner's worker and a scorer's, processes both."""
    with isgd.LocalCluster(2) as cluster, cluster.get_client() as client:
        yield client


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
