"""A run with two learners: trained as by one, whatever is killed, to the bit if it is synchronous."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial

import dask
import pytest
import torch
import torch.distributed as dist
from distributed import Client
from harness import (
    WAIT,
    committed,
    fit,
    holder,
    kill,
    learning,
    lowest_step,
    no_gaps,
    reaches,
    saved,
    state,
    until,
)

import dask_isgd as isgd
from dask_isgd.errors import NoLearnerWorkerError, NonFiniteLossError
from dask_isgd.learner.group import leader

pytestmark = pytest.mark.cluster

ALL_LEARN = isgd.Scoring(passes=0)
"""Nobody changes roles (``test_roles_change.py``): each incarnation is one that a fault began."""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of two workers for learners, which also score if need be."""
    with isgd.LocalCluster(2, learners=2) as cluster, cluster.get_client() as client:
        yield client


def not_finite_on_another(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy, but for rank 1 of a group."""
    losses = torch.nn.functional.cross_entropy(output, target, reduction="none")
    return losses + (torch.nan if dist.is_initialized() and dist.get_rank() == 1 else 0.0)


def other_pid(client: Client, run: isgd.Run) -> int:
    """The process of the rank that does not hold the run."""
    holder_pid = holder(run)["pid"]
    (pid,) = {int(pid) for pid in client.run(os.getpid).values()} - {holder_pid}
    return pid


def test_two_learners_train_as_one_does(client, digits, tmp_path):
    found = {}
    for learners in (1, "all"):
        settings = learning(steps=300, batch_size=64, learners=learners)
        run = fit(client, digits, tmp_path / str(learners), learning=settings, scoring=ALL_LEARN)
        found[learners] = run.wait(timeout=WAIT, progress=False)
        assert run.history.step.values[-1] == 300
    assert found["all"]["train_loss"] == pytest.approx(found[1]["train_loss"], rel=0.2)
    assert found["all"]["gain"] == pytest.approx(found[1]["gain"], rel=0.3)


def test_a_killed_rank_is_done_without_and_comes_back(client, digits, run_dir, capsys):
    client.run(setattr, leader, "_PATIENCE", 0.0)
    run = fit(client, digits, run_dir, learning=learning(learners=2), scoring=ALL_LEARN)
    until(run, saved(run))
    step = run.latest["step"]
    kill(other_pid(client, run))
    seconds = [until(run, lambda latest: latest["incarnation"] == 2 and latest["step"] > step)]
    assert lowest_step(run, 2) >= step, "rank 0 commits what the group has learned"
    until(run, reaches(0, incarnation=3))  # its worker is back
    kept = committed(run)
    kill(holder(run)["pid"])
    seconds.append(until(run, lambda latest: latest["incarnation"] >= 4 and latest["step"] > kept))
    with capsys.disabled():
        print(f"\nrank 1, then rank 0 killed: back after {seconds[0]:.1f} and {seconds[1]:.1f} s")
    assert lowest_step(run, 4) >= kept > 0
    run.pause()
    until(run, lambda latest: run.status == "paused")
    run.unpause()
    until(run, reaches(committed(run) + 30, incarnation=4))
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)
    learners = run.history.learners.values
    assert learners[0] == 2
    assert 1 in learners


AVERAGES = {"sync_every": 5, "outer_momentum": 0.5, "outer_rate": 0.9}


@pytest.mark.parametrize("averages", [{}, AVERAGES], ids=["sums", "averages"])
def test_a_synchronous_group_is_reproducible_to_the_bit(client, digits, tmp_path, averages):
    """An average leaves all ranks in the state that rank 0 commits."""
    settings = learning(steps=80, synchronous=True, checkpoint_steps=1, learners=2, min_learners=2, **averages)
    whole = fit(client, digits, tmp_path / "whole", learning=settings)
    whole.wait(timeout=WAIT, progress=False)
    broken = fit(client, digits, tmp_path / "broken", learning=settings)
    until(broken, reaches(40))
    kill(other_pid(client, broken))
    broken.wait(timeout=WAIT, progress=False)
    assert broken.latest["incarnation"] > 1
    assert state(broken) == state(whole)


def test_learners_that_average_lose_nothing_when_one_is_killed(client, digits, run_dir):
    run = fit(client, digits, run_dir, learning=learning(learners=2, **AVERAGES), scoring=ALL_LEARN)
    until(run, saved(run))
    step, incarnation = run.latest["step"], run.latest["incarnation"]
    kill(other_pid(client, run))
    until(run, lambda latest: latest["incarnation"] > incarnation and latest["step"] > step + 100)
    assert lowest_step(run, incarnation + 1) >= step
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)
    assert run.history.loss.values[-3:].mean() < 0.5 * run.history.loss.values[0]


@pytest.mark.slow  # it waits until the others' patience ends
def test_a_rank_that_hangs_is_done_without_and_nothing_is_lost(digits, run_dir):
    with isgd.LocalCluster(2, learners=2) as cluster, cluster.get_client() as client:
        client.run(partial(dask.config.set, {"isgd.cluster.timeout": "6 s"}))  # so long do ranks wait for each other
        run = fit(client, digits, run_dir, learning=learning(learners=2))
        until(run, saved(run))
        hung, step, incarnation = other_pid(client, run), run.latest["step"], run.latest["incarnation"]
        os.kill(hung, signal.SIGSTOP)
        try:
            until(run, lambda latest: latest["incarnation"] > incarnation and latest["step"] > step + 20)
        finally:
            os.kill(hung, signal.SIGCONT)
        until(run, lambda latest: latest.get("examples_scored", 0) > 0)  # by the worker that is done without
        assert lowest_step(run, incarnation + 1) >= step
        assert run.stop(timeout=WAIT) == "stopped"
        no_gaps(run)


@pytest.mark.slow  # a cluster of its own, which it leaves with other workers
def test_a_rank_whose_worker_retires_leaves_and_nothing_is_lost(digits, run_dir):
    with isgd.LocalCluster(2, learners=2) as cluster, cluster.get_client() as client:
        run = fit(client, digits, run_dir, learning=learning(learners=2), scoring=ALL_LEARN)
        until(run, saved(run))
        step = run.latest["step"]
        (other,) = [address for address, pid in client.run(os.getpid).items() if pid == other_pid(client, run)]
        client.retire_workers([other])
        until(run, lambda latest: latest["incarnation"] == 2 and latest["step"] > step)
        assert lowest_step(run, 2) >= step
        assert run.stop(timeout=WAIT) == "stopped"
        no_gaps(run)


def test_places_are_taken_together_or_not_at_all(client, digits, run_dir):
    settings = learning(learners=3)
    with (
        dask.config.set({"isgd.cluster.timeout": "1 s"}),
        pytest.raises(NoLearnerWorkerError, match="wanted at most 2"),
    ):
        fit(client, digits, run_dir, learning=settings)
    assert not run_dir.exists()


def test_an_error_of_the_other_rank_ends_the_run_with_its_words(client, digits, run_dir):
    run = fit(client, digits, run_dir, loss=not_finite_on_another, learning=learning(learners=2, batch_size=2))
    with pytest.raises(NonFiniteLossError, match="examples is not finite"):
        run.wait(timeout=WAIT, progress=False)
