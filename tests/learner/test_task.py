"""A learner that cannot be opened leaves nothing behind on its worker."""

from __future__ import annotations

import threading
from unittest.mock import patch

import pytest
from conftest import MODEL
from distributed import Client

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.coordinator.task import coordinate
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import StorageFullError
from dask_isgd.learner import task
from dask_isgd.runtime import pubsub

WAIT = 120


def learn_in_vain(spec: RunSpec, broken: str) -> tuple[str, set[str], list[str]]:
    """Run a learner of which a part cannot be opened: the error, threads and subscriptions that are left."""
    before = set(threading.enumerate())
    message = ""
    with patch(f"dask_isgd.learner.{broken}", side_effect=StorageFullError("no room")):
        try:
            task.learn(spec)
        except StorageFullError as error:
            message = str(error)
    names = {thread.name for thread in set(threading.enumerate()) - before}
    topics = [topic for handlers in pubsub._handlers.values() for topic in handlers if topic == spec.topic]
    ours = {name for name in names if name.startswith("isgd-") or name in ("checkpoint", "publication", "control")}
    return message, ours, topics


@pytest.mark.parametrize(
    "broken",
    [
        "weight_reader.WeightReader.open",  # a subscription is open
        "checkpointing.Checkpointer._restore",  # and the thread that reads weights, and the feed
        "background.LatestJobWorker.open",  # and the watcher of the worker's departure, in the midst of a part
        "publisher.Publisher.open",  # and the thread that commits
    ],
)
def test_what_was_opened_is_closed(client: Client, digits, run_dir, broken):
    settings = isgd.Learning(steps=10, batch_size=8, cache_memory=1, threads=1)
    plan = prepare(RunRequest(model=MODEL, data=digits, run_dir=run_dir, learning=settings))
    create(plan)
    future = client.submit(learn_in_vain, plan.spec, broken, pure=False, resources={"learner": 1})
    assert future.result(timeout=WAIT) == ("no room", set(), [])


@pytest.mark.parametrize("function", [task.learn, coordinate])
def test_a_task_of_a_start_that_was_superseded_takes_no_lease(client: Client, digits, run_dir, function):
    settings = isgd.Learning(steps=10, batch_size=8, threads=1)
    plan = prepare(RunRequest(model=MODEL, data=digits, run_dir=run_dir, learning=settings))
    create(plan)
    plan.spec.directory.set_control(want="run", attempt=plan.spec.attempt + 1)
    result = client.submit(function, plan.spec, pure=False).result(timeout=WAIT)
    assert result["outcome"] == "superseded"
    assert not (run_dir / "leases").exists()
