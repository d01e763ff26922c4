"""Tasks in flight: what is over is a result, an error or lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
from distributed import Client, Event, Future, KilledWorker
from distributed.client import FutureCancelledError

from dask_isgd.coordinator.in_flight import CompletedTask, InFlightTasks
from dask_isgd.errors import DataError, WaitTimeoutError

WAIT = 30
ORDER = (1, 0)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    options = {"processes": False, "dashboard_address": "127.0.0.1:0", "n_workers": 1, "threads_per_worker": 2}
    with Client(set_as_default=False, host="127.0.0.1", protocol="tcp://", **options) as client:
        yield client


def fly(client: Client, **tasks: Future) -> InFlightTasks:
    flight = InFlightTasks(client, WAIT, lambda: None)
    for chunk, future in enumerate(tasks.values()):
        flight.launch(chunk, future, ORDER)
    return flight


def over(flight: InFlightTasks, count: int) -> dict[int, object]:
    found: dict[int, object] = {}
    deadline = time.monotonic() + WAIT
    while len(found) < count:
        assert time.monotonic() < deadline
        found.update((task.chunk, task) for task in flight.completed())
        time.sleep(0.01)
    return found


def test_results_and_errors(client):
    flight = fly(client, good=client.submit(int, 7, pure=False), bad=client.submit(int, "x", pure=False))
    found = over(flight, 2)
    assert found[0].result == 7
    assert isinstance(found[1].result, ValueError)
    assert not found[0].lost
    assert not found[1].lost
    assert len(flight) == 0


def test_a_result_that_is_lost_while_it_is_fetched_is_lost(client, monkeypatch):
    """Told finished, and cancelled before it was fetched: Dask's ``gather`` then has None in its place."""
    flight = fly(client, gone=client.submit(int, 7, pure=False), good=client.submit(int, 8, pure=False))
    futures = [future for future, _, _ in flight._tasks.values()]
    for future in futures:
        future.result(timeout=WAIT)
    gather = client.gather

    async def late(wanted, **options):
        await client.cancel([futures[0]], asynchronous=True)
        return await gather(wanted, **options)

    monkeypatch.setattr(client, "gather", late)
    found = over(flight, 2)
    assert found[0].lost, found[0]
    assert found[1].result == 8


def test_results_that_cannot_be_fetched_are_not_waited_for_without_end(client, monkeypatch):
    """As when the last worker dies that held them: Dask's ``gather`` then waits for another to compute them."""
    flight = fly(client, stuck=client.submit(int, 7, pure=False))
    flight._timeout = 0.5

    async def without_end():
        await asyncio.Event().wait()

    monkeypatch.setattr(client, "gather", lambda wanted, **options: without_end())
    found = over(flight, 1)
    assert found[0].lost
    assert "could not be fetched" in str(found[0].result)
    assert len(flight) == 0


@pytest.mark.parametrize(
    ("result", "lost"),
    [
        (7, False),
        (ValueError("x"), False),
        (DataError("bad chunk"), False),
        (OSError("no space"), False),
        (KilledWorker("k", None, 3), False),  # it may be its own fault: several workers died of it
        (CancelledError(), True),
        (asyncio.CancelledError(), True),
        (FutureCancelledError("k", "scheduler-connection-lost"), True),
        (WaitTimeoutError("too late"), True),
    ],
    ids=repr,
)
def test_what_counts_as_lost(result, lost):
    assert CompletedTask(0, ORDER, result).lost is lost


def blocked(client: Client, name: str) -> tuple[Event, Future]:
    """A task that runs until its event is set."""
    event = Event(name, client=client)
    return event, client.submit(lambda: Event(name).wait(WAIT), pure=False)


def test_an_overdue_task_is_cancelled_and_lost(client):
    event, future = blocked(client, "overdue")
    flight = InFlightTasks(client, 0.2, lambda: None)
    flight.launch(5, future, (2, 40))
    (task,) = over(flight, 1).values()
    assert (task.chunk, task.order, task.lost) == (5, (2, 40), True)
    assert "no result within 0.2 s" in str(task.result)
    assert (len(flight), future.status) == (0, "cancelled")
    event.set()


def test_a_cancelled_task_is_lost_and_cancel_gives_up_the_others(client):
    first, future = blocked(client, "first")
    flight = fly(client, one=future)
    future.cancel()
    assert over(flight, 1)[0].lost
    second, future = blocked(client, "second")
    flight.launch(1, future, ORDER)
    assert flight.chunks == [1]
    flight.cancel()
    assert (len(flight), future.status, list(flight.completed())) == (0, "cancelled", [])
    first.set()
    second.set()


def test_the_former_task_of_a_chunk_that_is_launched_again_is_ignored(client):
    event, former = blocked(client, "former")
    flight = fly(client, former=former)
    flight.launch(0, client.submit(int, 8, pure=False), (1, 32))
    event.set()
    former.result(timeout=WAIT)
    found = over(flight, 1)
    assert (found[0].result, found[0].order) == (8, (1, 32))
    assert list(flight.completed()) == []


@pytest.mark.parametrize(("tasks", "ended"), [(1, 1), (4, 1), (8, 2), (9, 3)])
def test_the_owner_is_woken_once_a_quarter_has_ended(client, tasks, ended):
    awake = threading.Event()
    flight = InFlightTasks(client, WAIT, awake.set)
    futures = [client.submit(int, chunk, pure=False) for chunk in range(tasks)]
    flight._tasks = {chunk: (future, ORDER, time.monotonic()) for chunk, future in enumerate(futures)}
    for chunk in range(ended):
        assert not awake.is_set()
        flight._done(chunk, futures[chunk])
    assert awake.is_set()


@pytest.mark.parametrize("kept", [True, False])
def test_a_kept_group_is_one_group_in_the_schedulers_record(client, kept):
    """Without it a new group is made for each task that begins after all others have ended."""
    forever = client.submit(Event("forever", client=client).wait, WAIT, pure=False)
    flight, name = InFlightTasks(client, WAIT, lambda: None), f"score-{kept}"
    for number in range(5):
        if kept:
            flight.keep_group(name, {})
        flight.launch(0, client.submit(int, number, key=(name, number), pure=False), ORDER)
        assert over(flight, 1)[0].result == number
        gone = [(name, n) for n in range(number + 1)]
        deadline = time.monotonic() + WAIT
        while client.run_on_scheduler(lambda dask_scheduler, gone=gone: any(k in dask_scheduler.tasks for k in gone)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def groups(dask_scheduler):
        return sum(group.name == name for each in dask_scheduler.computations for group in each.groups)

    assert client.run_on_scheduler(groups) == (1 if kept else 5)
    Event("forever", client=client).set()
    forever.result(timeout=WAIT)
