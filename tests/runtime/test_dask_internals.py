"""Canaries: a release of distributed that moves a private part, or changes what a plugin sees, fails here first."""

from __future__ import annotations

import threading

import pytest
from distributed import Client, LocalCluster, get_worker

from dask_isgd.runtime.dask_internals import task_status
from dask_isgd.runtime.scheduler_plugin import guard_run

WAIT = 60


@pytest.fixture(scope="module")
def client():
    options = {"processes": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "protocol": "tcp://"}
    with LocalCluster(n_workers=2, threads_per_worker=2, **options) as cluster, Client(cluster) as client:
        yield client


told: dict[str, list[str]] = {}
go_on = {name: threading.Event() for name in ("cancelled", "leaving")}
running = {name: threading.Event() for name in ("cancelled", "leaving")}


def task(name: str) -> None:
    """Writes down its fate when it starts, and again when it has been told to look."""
    worker = get_worker()
    key = worker.get_current_task()
    told[name] = [task_status(worker, key)]
    running[name].set()
    go_on[name].wait(WAIT)
    deadline = threading.Event()
    for _ in range(int(WAIT / 0.02)):
        if task_status(worker, key) != "wanted":
            break
        deadline.wait(0.02)
    told[name].append(task_status(worker, key))
    running[name].clear()
    over[name].set()


over = {name: threading.Event() for name in ("cancelled", "leaving")}


def test_a_task_learns_that_it_was_cancelled(client):
    future = client.submit(task, "cancelled", pure=False)
    assert running["cancelled"].wait(WAIT)
    future.cancel()
    go_on["cancelled"].set()
    assert over["cancelled"].wait(WAIT)
    assert told["cancelled"] == ["wanted", "cancelled"]


def test_a_task_learns_that_its_worker_leaves(client):
    address = next(iter(client.scheduler_info()["workers"]))
    future = client.submit(task, "leaving", pure=False, workers=[address])
    assert running["leaving"].wait(WAIT)
    go_on["leaving"].set()
    client.retire_workers([address])
    assert over["leaving"].wait(WAIT)
    assert told["leaving"] == ["wanted", "leaving"]
    future.release()


def test_the_scheduler_takes_the_guard_and_drops_it_with_its_tasks(client):
    guard_run(client, "r", "isgd-r", 1, {"learner": ("learn-r", 1), "coordinator": ("coordinate-r", 1)})
    scheduler = client.cluster.scheduler
    assert "isgd-r-1" in scheduler.plugins
    guard = scheduler.plugins["isgd-r-1"]
    futures = [client.submit(_wait, key=(f"{part}-r", 1), pure=False) for part in ("learn", "coordinate")]
    assert begun.wait(WAIT)
    workers = list(scheduler.workers.values())
    learner = guard.addresses[("learn-r", 1)]
    assert learner not in [w.address for w in guard.valid_workers_downscaling(scheduler, workers)]
    gate.set()
    for future in futures:
        future.result(timeout=WAIT)
    del future, futures
    for _ in range(int(WAIT / 0.02)):
        if "isgd-r-1" not in scheduler.plugins:
            break
        threading.Event().wait(0.02)
    assert "isgd-r-1" not in scheduler.plugins


def test_a_task_that_only_prefers_workers_wakes_for_any_other():
    """Dask parks it for the workers it names: restarted under new addresses, those never come back."""
    options = {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "protocol": "tcp://"}
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, processes=False, **options) as cluster,
        Client(cluster) as client,
    ):
        guard_run(client, "q", "isgd-q", 1, {"learner": ("learn-q", 1)})
        soft = {"workers": ["tcp://127.0.0.1:1"], "allow_other_workers": True}
        future = client.submit(int, key=("learn-q", 1), pure=False, **soft)
        cluster.scale(1)
        assert future.result(timeout=WAIT) == 0
        del future


begun, gate = threading.Event(), threading.Event()


def _wait() -> None:
    begun.set()
    gate.wait(WAIT)


def test_what_the_guard_touches_is_there(client):
    from distributed.scheduler import TaskState

    assert "suspicious" in TaskState.__slots__
    assert client.cluster.scheduler.allowed_failures == 3
