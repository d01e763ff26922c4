"""Faults 3, 9, 10 and 14 on a cluster of processes started apart, as on a cluster of machines."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from harness import (
    WAIT,
    Apart,
    committed,
    fit,
    holder,
    kill,
    learning,
    lowest_step,
    no_gaps,
    process,
    reaches,
    trained,
    until,
)

from dask_isgd.core.spec import topic_of

pytestmark = pytest.mark.cluster

TTL = 8


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    os.environ["DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL"] = f"{TTL}s"
    try:
        with Apart(tmp_path_factory.mktemp("apart")) as cluster:
            del os.environ["DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL"]
            cluster.worker("scorer")
            yield cluster
    finally:
        os.environ.pop("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", None)


@pytest.fixture(scope="module")
def client(apart):
    return apart.client()


def incarnations(client, run, kind: str) -> list[int]:
    """Of the learners that said something of one kind, in the order it was heard."""
    return [e["incarnation"] for _, e in client.get_events(topic_of(run.id)) if e["kind"] == kind]


def test_a_terminated_worker_leaves_within_its_grace_and_loses_a_step_at_most(apart, client, digits, run_dir, capsys):
    first = apart.worker("learner", threads=2)
    run = fit(client, digits, run_dir, learning=learning(checkpoint_steps=10**6))
    until(run, reaches(100))
    apart.worker("learner", "--no-nanny", threads=2)  # a nanny would end a worker that hangs
    client.wait_for_workers(3, timeout=WAIT)
    first.send_signal(signal.SIGTERM)
    seconds = until(run, reaches(1, incarnation=2))
    with capsys.disabled():
        print(f"\nworker terminated: the next learner trains after {seconds:.1f} s")
    assert run.directory.folder.exists("leases/learner-0001.left")
    assert trained(run, 1) <= lowest_step(run, 2) < trained(run, 1) + 10  # reports come every 10 steps
    published = incarnations(client, run, "published")
    assert published == sorted(published)
    assert first.wait(WAIT) is not None
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)


def test_a_hanging_worker_is_replaced_and_fenced_when_it_wakes_up(apart, client, digits, run_dir, capsys):
    run = fit(client, digits, run_dir)
    until(run, reaches(100))
    hanging = holder(run)["pid"]
    apart.worker("learner", threads=2)
    client.wait_for_workers(3, timeout=WAIT)
    kill(hanging, signal.SIGSTOP)
    try:
        seconds = until(run, reaches(1, incarnation=2))
        with capsys.disabled():
            print(f"\nworker hangs: replaced after {seconds:.1f} s, of which {TTL} s are worker-ttl")
        names = set(run.directory.checkpoints().names())
    finally:
        kill(hanging, signal.SIGCONT)
    until(run, reaches(run.latest["step"] + 200, incarnation=2))
    old = {name for name in run.directory.checkpoints().names() if name.endswith("i0001")}
    assert old <= names
    published = incarnations(client, run, "published")
    assert published == sorted(published)
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)


SLOW = """
import sys, threading, time
from distributed import Client

def slow(event):
    print("heard", flush=True)
    time.sleep(0.5)

with Client(sys.argv[1]) as client:
    client.subscribe_topic(sys.argv[2], slow)
    threading.Event().wait()
"""


def test_a_slow_subscriber_slows_nobody(client, digits, run_dir):
    run = fit(client, digits, run_dir)
    until(run, reaches(400))
    with process("-c", SLOW, client.scheduler.address, topic_of(run.id)) as other:
        assert other.stdout.readline() == "heard\n"
        before = run.latest["step"]
        until(run, reaches(before + 1000))
    assert run.stop(timeout=WAIT) == "stopped"
    rates, steps = run.history.steps_per_second.values, run.history.step.values
    # a machine's other work is noise; waiting for the subscriber would cost half a second an event
    assert np.median(rates[steps > before]) > np.median(rates[steps <= before]) / 3


def test_without_its_scheduler_everything_ends_with_a_checkpoint_and_resume_goes_on(
    apart, client, digits, run_dir, tmp_path, capsys
):
    run = fit(client, digits, run_dir, learning=learning(checkpoint_steps=10**6))
    until(run, reaches(100))
    pids = [holder(run)["pid"], holder(run, "coordinator")["pid"]]
    step = run.latest["step"]
    began = time.monotonic()
    apart.scheduler.kill()
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() - began < 5 * 35
        time.sleep(0.1)  # another process's end can only be asked for
    with capsys.disabled():
        print(f"\nscheduler killed: all workers gone after {time.monotonic() - began:.1f} s")
    kept = committed(run)
    assert kept >= step
    with Apart(tmp_path) as another:
        another.worker("scorer")
        another.worker("learner", threads=2)
        again = fit(another.client(), digits, run_dir, resume=True, learning=learning(steps=kept + 50))
        again.wait(timeout=WAIT)
        no_gaps(again)


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
