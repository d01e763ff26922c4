"""Canaries: a release of distributed that moves a private part, or changes what a plugin sees, fails here first."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
from dask.utils import key_split
from distributed import Client, Event, LocalCluster, Nanny, Scheduler, Status, Worker, get_worker, span, wait
from distributed.metrics import context_meter

from dask_isgd.runtime import dask_internals
from dask_isgd.runtime.dask_internals import SpecClusterHooks, memory_limit, task_status, worker_supply
from dask_isgd.runtime.scheduler_plugin import guard_run

pytestmark = pytest.mark.cluster

WAIT = 60


@pytest.fixture(scope="module")
def client():
    options = {"processes": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "protocol": "tcp://"}
    with LocalCluster(n_workers=2, threads_per_worker=2, **options) as cluster, Client(cluster) as client:
        yield client


seen: dict[str, list[str]] = {}
proceed = {name: threading.Event() for name in ("cancelled", "leaving")}
running = {name: threading.Event() for name in ("cancelled", "leaving")}


def task(name: str) -> None:
    """Records its status when it starts, and again once the status has changed."""
    worker = get_worker()
    key = worker.get_current_task()
    seen[name] = [task_status(worker, key)]
    running[name].set()
    proceed[name].wait(WAIT)
    deadline = threading.Event()
    for _ in range(int(WAIT / 0.02)):
        if task_status(worker, key) != "wanted":
            break
        deadline.wait(0.02)
    seen[name].append(task_status(worker, key))
    running[name].clear()
    over[name].set()


over = {name: threading.Event() for name in ("cancelled", "leaving")}


def test_a_task_learns_that_it_was_cancelled(client):
    future = client.submit(task, "cancelled", pure=False)
    assert running["cancelled"].wait(WAIT)
    future.cancel()
    proceed["cancelled"].set()
    assert over["cancelled"].wait(WAIT)
    assert seen["cancelled"] == ["wanted", "cancelled"]


def test_a_task_learns_that_its_worker_leaves(client):
    address = next(iter(client.scheduler_info()["workers"]))
    future = client.submit(task, "leaving", pure=False, workers=[address])
    assert running["leaving"].wait(WAIT)
    proceed["leaving"].set()
    client.retire_workers([address])
    assert over["leaving"].wait(WAIT)
    assert seen["leaving"] == ["wanted", "leaving"]
    future.release()


def test_the_memory_limit_of_a_tasks_worker_is_known(client):
    assert client.submit(memory_limit, pure=False).result(timeout=60) == next(
        worker["memory_limit"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()
    )
    assert memory_limit() is None, "outside of a worker"


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

    assert {"suspicious", "loose_restrictions", "worker_restrictions"} <= set(TaskState.__slots__)
    assert client.cluster.scheduler.allowed_failures == 3


# Clusters ---------------------------------------------------------------------------------------

OPTIONS = {"host": "127.0.0.1", "dashboard": False}
SCHEDULER = {
    "cls": Scheduler,
    "options": {**OPTIONS, "port": 0, "protocol": "tcp://", "dashboard_address": "127.0.0.1:0"},
}


class Recorded(SpecClusterHooks):
    """A cluster that records the calls of its hooks."""

    def __init__(self, **options) -> None:
        self.calls: list[str] = []
        self.changed = asyncio.Event()
        worker = {"cls": Worker, "options": {**OPTIONS, "nthreads": 3, "memory_limit": "1 GiB"}}
        super().__init__(scheduler=SCHEDULER, worker=worker, asynchronous=True, **options)

    def on_workers_changed(self, removed: bool) -> None:
        self.calls.append("removed" if removed else "added")
        self.changed.set()

    def on_closed(self) -> None:
        self.calls.append("closed")

    async def until(self, count: int) -> None:
        while len(self.scheduler_info["workers"]) != count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), WAIT)


def test_a_cluster_calls_its_hooks_and_starts_what_is_missing():
    async def run() -> list[str]:
        async with Recorded() as cluster:
            assert dask_internals.memory_per_worker(cluster) == 2**30
            assert dask_internals.threads_per_worker(cluster) == 3
            cluster.worker_spec.update(cluster.new_worker_spec())
            await dask_internals.start_missing(cluster)
            await cluster.until(1)
            cluster.worker_spec.clear()
            await dask_internals.start_missing_soon(cluster)
            await cluster.until(0)
        return cluster.calls

    assert asyncio.run(run()) == ["added", "removed", "closed"]


def test_a_task_that_is_kept_is_let_go_once_it_is_done():
    async def run() -> None:
        async with Recorded() as cluster:
            gone = asyncio.Event()
            task = asyncio.create_task(gone.wait())
            dask_internals.keep_until_done(cluster, task)
            assert task in cluster._futures
            gone.set()
            await task
            await asyncio.sleep(0)
            assert task not in cluster._futures

    asyncio.run(run())


def test_a_nanny_that_restarts_its_worker_is_recognised():
    async def run() -> list[bool]:
        async with Scheduler(**SCHEDULER["options"]) as scheduler, Nanny(scheduler.address, **OPTIONS) as nanny:
            found = [dask_internals.nanny_restarts(nanny)]
            await nanny.process.kill()
            found.append(nanny.status is Status.running and dask_internals.nanny_restarts(nanny))
        return [*found, dask_internals.nanny_restarts(nanny)]

    with dask.config.set({"distributed.nanny.pre-spawn-environ": {}}):
        assert asyncio.run(run()) == [False, True, False]


def test_what_a_queues_cluster_makes_jobs_of(tmp_path: Path):
    jobqueue = pytest.importorskip("dask_jobqueue")

    async def run() -> None:
        options = {"cores": 8, "processes": 2, "memory": "8GB", "security": True, "shared_temp_directory": tmp_path}
        scheduler = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        cluster = jobqueue.SLURMCluster(scheduler_options=scheduler, asynchronous=True, **options)
        try:
            assert dask_internals.threads_per_process(cluster) == 4
            dask_internals.job_options(cluster)["cores"] = 16
            assert dask_internals.threads_per_process(cluster) == 8
            assert "--nthreads 8" in cluster.job_script()
            assert len(os.listdir(tmp_path)) == 3
            dask_internals.close_key_files(cluster)
            assert os.listdir(tmp_path) == []
            dask_internals.close_key_files(cluster)
        finally:
            await cluster.close()

    asyncio.run(run())


def test_exported_settings_are_those_of_the_process_started_after_it():
    line = dask_internals.export_config({"isgd": {"cluster": {"spare-threads": 7}}})
    code = "import dask; print(dask.config.get('isgd.cluster.spare-threads'))"
    done = subprocess.run(
        ["sh", "-c", f'{line}\nexec {sys.executable} -c "{code}"'], capture_output=True, timeout=WAIT, check=True
    )
    assert done.stdout == b"7\n"


# The dashboard ----------------------------------------------------------------------------------


def test_pages_of_a_running_dashboard(client):
    pytest.importorskip("bokeh")
    scheduler = client.cluster.scheduler
    assert dask_internals.serves_page(scheduler, "/status") is True
    assert dask_internals.serves_page(scheduler, "/canary") is False
    assert "canary" not in dask_internals.page_template().render()


def test_a_page_is_listed_served_and_named():
    pytest.importorskip("bokeh")
    from distributed.dashboard.scheduler import applications, template_variables

    def page(scheduler, extra, document):
        document.title = "canary"

    async def run() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", protocol="tcp://") as scheduler:
            dask_internals.serve_pages(scheduler, {"/canary": page})
            assert dask_internals.serves_page(scheduler, "/canary") is True
            dask_internals.name_page(scheduler, "canary")
            dask_internals.name_page(scheduler, "canary")
            assert template_variables(scheduler)["pages"].count("canary") == 1

    asyncio.run(run())
    dask_internals.list_pages({"/individual-canary": page})
    assert applications.pop("/individual-canary") is page


def test_a_scheduler_without_a_dashboard_has_no_page():
    async def run() -> bool | None:
        async with Scheduler(**SCHEDULER["options"]) as scheduler:
            return dask_internals.serves_page(scheduler, "/status")

    assert asyncio.run(run()) is None


def test_a_task_sees_the_threads_and_the_resources_of_its_worker(client):
    nthreads, resources = client.submit(lambda: worker_supply(get_worker()), pure=False).result(timeout=WAIT)
    assert (nthreads, dict(resources)) == (2, {})


def test_a_topic_is_forgotten_unless_someone_listens(client):
    def forget(dask_scheduler: Scheduler) -> None:
        dask_internals.task_edits().forget_topic(dask_scheduler, "isgd-canary")

    def subscribers(dask_scheduler: Scheduler) -> int:
        topic = dask_scheduler._broker._topics.get("isgd-canary")
        return -1 if topic is None else len(topic.subscribers)

    def await_subscribers(count: int) -> None:  # a subscription and its end may be overtaken by other requests
        deadline = time.monotonic() + WAIT
        while client.run_on_scheduler(subscribers) != count:
            assert time.monotonic() < deadline

    client.subscribe_topic("isgd-canary", lambda event: None)
    await_subscribers(1)
    client.log_event("isgd-canary", {"a": 1})
    assert client.get_events("isgd-canary")
    client.run_on_scheduler(forget)
    assert client.get_events("isgd-canary") == ()
    client.unsubscribe_topic("isgd-canary")
    await_subscribers(0)
    client.run_on_scheduler(forget)
    assert client.run_on_scheduler(subscribers) == -1


def test_event_loops_wake_seldom_for_diagnostics_once_calmed():
    def intervals(server) -> dict[str, float]:
        return {name: callback.callback_time for name, callback in server.periodic_callbacks.items()}

    async def run() -> None:
        async with (
            Scheduler(**SCHEDULER["options"]) as scheduler,
            Worker(scheduler.address, host="127.0.0.1") as worker,
        ):
            profiler = {"profile", "profile-cycle"}
            for server, names in ((scheduler, {"tick", "monitor"}), (worker, {"tick", "monitor", *profiler})):
                before = intervals(server)
                dask_internals.calm(server)
                after = intervals(server)
                assert {name for name in before if after[name] > before[name]} == names
                assert all(after[name] >= 250 for name in names)

    asyncio.run(run())


def test_a_calm_remembers_two_minutes(client):
    def calmed(dask_worker: Worker) -> tuple[int, int]:
        dask_internals.calm(dask_worker)
        for _ in range(100):
            dask_worker.cycle_profile()
        return len(dask_worker.profile_history), len(dask_worker.profile_keys_history)

    assert set(client.run(calmed).values()) == {(12, 12)}


def wait_for(event: str, _: int) -> None:
    Event(event).wait(WAIT)


def test_submissions_are_forgotten_but_for_the_latest(client):
    """Each call of ``submit`` or ``map`` leaves a record in the spans of a task that lasts and of what it needs."""
    (needed,) = client.scatter([1], hash=False)
    with span("run"):
        forever = client.submit(wait_for, "submissions", needed, key=("forever", 1), pure=False)

    def noted(dask_scheduler: Scheduler, *, forget: bool, keys: tuple = (forever.key, needed.key)) -> list[int]:
        tasks = [dask_scheduler.tasks[key] for key in keys]
        if forget:
            dask_internals.task_edits().forget_submissions(dask_scheduler, tasks[0])
        spans = dask_scheduler.extensions["spans"].spans
        return [len(spans[task.group.span_id]._metadata["collections"]) for task in tasks]

    with span("run"):
        for number in range(150):
            client.submit(max, number, needed, key=("forever", 2, number), pure=False)
        assert client.submit(max, 7, needed, key=("forever", 3), pure=False).result(timeout=WAIT) == 7
    assert min(client.run_on_scheduler(noted, forget=False)) >= 151
    assert client.run_on_scheduler(noted, forget=True) == [100, 100]
    Event("submissions", client=client).set()
    forever.result(timeout=WAIT)


def metered() -> int:
    """Return the number of Dask's callbacks that receive a metric in this task."""
    received = []
    with context_meter.add_callback(lambda *metric: received.append(metric)):
        context_meter.digest_metric("test", 1.0, "seconds")
    return len(context_meter._callbacks.get()) + (len(received) != 1)


def test_a_long_task_keeps_no_metrics_of_dask(client):
    assert client.submit(metered, pure=False).result(timeout=WAIT) > 0
    assert client.submit(dask_internals.unmetered(metered), pure=False).result(timeout=WAIT) == 0


def test_the_cache_of_keys_is_emptied_before_it_is_large(client):
    def held(dask_scheduler: Scheduler, *, forget: bool) -> int:
        if forget:
            task = next(iter(dask_scheduler.tasks.values()))
            dask_internals.task_edits().forget_submissions(dask_scheduler, task)
        else:
            dask_internals.forget_keys()
        return int(key_split.cache_info().currsize)

    forever = client.submit(wait_for, "keys", 0, pure=False)
    wait([client.submit(int, 1, pure=False)], timeout=WAIT)
    key_split.cache_clear()
    for forget in (False, True):
        for number in range(9_000):
            key_split(("score", number))
        assert client.run_on_scheduler(held, forget=forget) >= 9_000
        for number in range(2_000):
            key_split(("score", -number))
        assert client.run_on_scheduler(held, forget=forget) < 100
    Event("keys", client=client).set()
    forever.result(timeout=WAIT)
