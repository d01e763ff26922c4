"""Faults 3 and 11: a worker whose time is up, and one that is killed for the memory it holds."""

from __future__ import annotations

import os
import signal

import pytest
from harness import WAIT, Apart, fit, holder, learning, lowest_step, no_gaps, reaches, saved, trained, until

from dask_isgd.core.spec import topic_of

pytestmark = pytest.mark.cluster

LIMIT = 900_000_000
PROMISE = 5.0
"""Seconds from the end of a worker to the first report of the next learner, its nanny's restart included."""


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    with Apart(tmp_path_factory.mktemp("worn-out")) as cluster:
        cluster.worker("scorer")
        yield cluster


@pytest.fixture(scope="module")
def client(apart):
    return apart.client()


def hog(share: float) -> None:
    """Hold this share of the worker's memory limit; beyond its limit the worker never returns from here."""
    import sys

    import psutil

    held = sys.__dict__.setdefault("_hogged", [])
    while psutil.Process().memory_info().rss < share * LIMIT:
        held.append(b"x" * 10_000_000)


def status_of(client, address: str) -> str:
    def look(dask_scheduler) -> str:
        worker = dask_scheduler.workers.get(address)
        return worker.status.name if worker is not None else "gone"

    return client.run_on_scheduler(look)


def test_a_worker_killed_for_memory_is_named_and_its_learner_goes_on(apart, client, digits, run_dir, capsys):
    worker = apart.worker("learner", "--memory-limit", str(LIMIT), threads=2)
    run = fit(client, digits, run_dir)
    until(run, saved(run))
    address = holder(run)["address"]

    client.run(hog, 0.87, workers=[address])  # paused from 80 % on: no new tasks, the learner is none
    until(run, lambda latest: status_of(client, address) == "paused")
    until(run, reaches(run.latest["step"] + 50))
    assert run.directory.leases().highest() == 1

    client.run(hog, 2.0, workers=[address], on_error="return")
    kept = run.directory.checkpoints().latest().step
    seconds = until(run, reaches(1, incarnation=2))
    with capsys.disabled():
        print(f"\nworker killed for memory: the next learner trains after {seconds:.1f} s")
    assert seconds < 5 * PROMISE
    assert lowest_step(run, 2) >= kept >= 50
    faults = [e for _, e in client.get_events(topic_of(run.id)) if e["kind"] == "fault"]
    (killed,) = [e["detail"] for e in faults if e["what"] == "learner killed for memory"]
    assert address in killed
    assert killed.endswith("of 900 MB")
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)
    os.killpg(worker.pid, signal.SIGKILL)  # the next test's learner is to run elsewhere


def test_a_worker_whose_lifetime_is_over_leaves_in_order_and_the_learner_goes_on_in_the_next(
    apart, client, digits, run_dir, capsys
):
    life = ("--lifetime", "15s", "--lifetime-stagger", "1s", "--lifetime-restart")
    apart.worker("learner", *life, threads=2)
    run = fit(client, digits, run_dir, learning=learning(checkpoint_steps=10**6))
    until(run, lambda latest: run.directory.folder.exists("leases/learner-0001.left"))
    seconds = until(run, reaches(1, incarnation=2))
    with capsys.disabled():
        print(f"\nlifetime over: the next learner trains after {seconds:.1f} s")
    assert seconds < 5 * PROMISE
    assert trained(run, 1) <= lowest_step(run, 2) < trained(run, 1) + 10  # reports come every 10 steps
    published = [e["incarnation"] for _, e in client.get_events(topic_of(run.id)) if e["kind"] == "published"]
    assert published == sorted(published)
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)
