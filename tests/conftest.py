"""What several tests share: a small dataset, a cluster of processes, homes of runs on disk and in a bucket."""

from __future__ import annotations

import importlib.util
import logging
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import azurite
import dask
import pytest
from distributed import Client

import dask_isgd as isgd
from dask_isgd.pipelines import PIPELINES
from dask_isgd.storage import Dataset
from dask_isgd.storage.backends.folder import Folder
from dask_isgd.storage.backends.stores import open_folder

MODEL = "dask_isgd.pipelines.models:digits"
SECRET = "hunter2"


def pytest_configure(config: pytest.Config) -> None:
    """Let processes that test beside each other not wait for each other's threads."""
    if hasattr(config, "workerinput") and importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


_OTHER_KINDS = {"cluster", "slurm", "browser", "notebooks", "slow", "cuda"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a cluster's client as ``cluster``, and what is of no other kind as ``unit``."""
    for item in items:
        if "client" in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")
        elif not _OTHER_KINDS & {marker.name for marker in item.iter_markers()}:
            item.add_marker("unit")


@dataclass(frozen=True)
class Home:
    """A place to keep a run, and what opens it."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Folder:
        return open_folder(self.url, self.options)

    @property
    def all(self) -> list[str]:
        """Every file there is below, by its relative name."""
        folder = self.folder
        if folder.local:
            return sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file())
        return sorted(folder._files())


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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server of this process."""
    moto = pytest.importorskip("moto.server")
    from moto.s3.responses import S3Response

    # S3 looks and puts in one step; moto in two.
    put, lock = S3Response.put_object, threading.Lock()

    def put_object(self: S3Response) -> object:
        with lock:
            return put(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture(scope="session")
def bucket(s3_server: str) -> tuple[str, dict[str, Any]]:
    """URL of a bucket, and the options that open it."""
    import boto3

    options = {"endpoint_url": s3_server, "key": "key", "secret": SECRET}
    name = f"runs-{uuid.uuid4().hex[:8]}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=s3_server, **keys).create_bucket(Bucket=name)
    return f"s3://{name}", options


@pytest.fixture
def s3(bucket: tuple[str, dict[str, Any]]) -> Home:
    """A folder in a bucket of an S3 server."""
    url, options = bucket
    return Home(f"{url}/{uuid.uuid4().hex}/run", options)


@pytest.fixture(scope="session")
def container() -> Iterator[tuple[str, dict[str, Any]]]:
    """URL of a container of Azure's, and the options that open it."""
    with azurite.azurite("runs") as opened:
        yield opened


@pytest.fixture
def azure(container: tuple[str, dict[str, Any]]) -> Home:
    """A folder in a container of Azure's, which only machines with an emulator have."""
    url, options = container
    return Home(f"{url}/{uuid.uuid4().hex}/run", options)


@pytest.fixture(params=["local", "s3", *(["azure"] if azurite.COMMAND is not None else [])])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """A folder on disk, and one in each kind of object store."""
    return Home(str(tmp_path / "runs" / "run")) if request.param == "local" else request.getfixturevalue(request.param)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
