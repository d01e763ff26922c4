"""The clusters on which ``cost.py`` trains: the library's own, Dask's, and processes started by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from distributed import Client

import dask_isgd as isgd


@contextmanager
def local(folder: Path) -> Iterator[Client]:
    """``dask_isgd.LocalCluster`` with a learner and a scorer."""
    with isgd.LocalCluster(2) as cluster, cluster.get_client() as client:
        yield client


@contextmanager
def plain_client(folder: Path) -> Iterator[Client]:
    """``distributed.Client()``: Dask's own LocalCluster, with no resources and nothing of this library."""
    with Client(dashboard_address="127.0.0.1:0", local_directory=str(folder)) as client:
        yield client


@contextmanager
def by_hand(folder: Path) -> Iterator[Client]:
    """``dask scheduler`` and two ``dask worker`` as a user starts them, in the environment of this process."""
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    worker = [*dask, "worker", "--scheduler-file", str(file), "--no-dashboard", "--local-directory", str(folder)]
    commands = (
        [*dask, "scheduler", "--scheduler-file", str(file), "--host", "127.0.0.1", "--port", "0", "--no-dashboard"],
        [*worker, "--resources", "learner=1", "--nthreads", "2"],
        [*worker, "--resources", "scorer=1", "--nthreads", "1"],
    )
    with ExitStack() as stack:
        for number, command in enumerate(commands):
            log = stack.enter_context((folder / f"dask-{number}.log").open("w"))
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(process.terminate)
        client = stack.enter_context(Client(scheduler_file=str(file), timeout="60s"))
        client.wait_for_workers(2, timeout=60)
        yield client
        client.shutdown()


CLUSTERS: dict[str, Callable[[Path], AbstractContextManager[Client]]] = {
    "local": local,
    "client": plain_client,
    "worker": by_hand,
}
