"""Tasks in flight: what is over is a result, an error or lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from distributed import Client, Future

from dask_isgd.coordinator.in_flight import InFlightTasks

WAIT = 30
ORDER = (1, 0)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    options = {"processes": False, "dashboard_address": None, "n_workers": 1, "threads_per_worker": 2}
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
