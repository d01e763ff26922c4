"""A run with several learners: workers that could learn score where that does more for it, and learn again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
from distributed import Client
from harness import WAIT, committed, fit, holder, kill, learning, lowest_step, no_gaps, saved, until

import dask_isgd as isgd
from dask_isgd import events
from dask_isgd.learner.gradient_sum import GradientSum
from dask_isgd.learner.group import roles, task

pytestmark = pytest.mark.cluster

_FINISH = GradientSum.finish


def slow_link(seconds: float) -> None:
    """Let every sum of gradients take so much longer, on this worker; and judge roles sooner."""
    task._REPORTS, task._FIRST, task._LAST, roles.AGAIN = 3, 0.5, 0.5, 5

    def finish(self, loss):
        total = _FINISH(self, loss)
        time.sleep(seconds)
        self.waited += seconds
        return total

    GradientSum.finish = finish


def fast_link() -> None:
    GradientSum.finish = _FINISH


@pytest.fixture
def client() -> Iterator[Client]:
    """A client of three workers that can learn and score."""
    with isgd.LocalCluster(3, learners=3) as cluster, cluster.get_client() as client:
        yield client


def groups(client: Client, run: isgd.Run) -> list[events.Group]:
    """Who learned, and why, as it was announced."""
    found = [events.parse(event) for _, event in client.get_events(events.topic_of(run.id))]
    return [event for event in found if isinstance(event, events.Group)]


def test_workers_score_where_learners_mostly_wait_and_learn_again_where_they_do_not(client, digits, run_dir):
    client.run(slow_link, 0.015)
    run = fit(client, digits, run_dir, learning=learning(learners="all", min_learners=1))
    until(run, lambda latest: latest.get("incarnation", 0) >= 2 and latest.get("scored_fraction") == 1.0)
    until(run, lambda latest: latest.get("examples_scored", 0) > 2 * 1437)
    first, *others = groups(client, run)
    second = next(group for group in others if len(group.learners) != 3)
    assert (len(first.learners), first.scorers) == (3, 0)
    assert (len(second.learners), second.scorers) == (1, 2)
    assert "2 of 3 score: that promises" in second.why
    # one of three waits for nobody; that three do not wait either any more is found by trying
    client.run(fast_link)
    incarnation = run.latest["incarnation"]
    until(run, lambda latest: latest["incarnation"] > incarnation)
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)
    history = run.history.load()
    assert run.latest.get("faults", 0) == 0
    assert set(history.learners_scoring.values) >= {0.0, 2.0}
    assert np.nanmax(history.roles_worth.values) > roles.MARGIN, "what was promised when roles changed"


def test_of_more_workers_than_learners_the_others_score(client, digits, run_dir):
    client.run(setattr, task, "_LAST", 1e9)
    client.run(setattr, task, "_FIRST", 1e9)  # nothing is judged
    run = fit(client, digits, run_dir, learning=learning(learners=2))
    until(run, saved(run))
    until(run, lambda latest: latest.get("examples_scored", 0) > 1437)
    assert run.stop(timeout=WAIT) == "stopped"
    assert set(run.history.learners.values) == {2.0}
    (group, *_) = groups(client, run)
    assert (len(group.learners), group.scorers) == (2, 0)


def test_whoever_is_killed_after_roles_changed_the_run_goes_on(client, digits, run_dir):
    client.run(slow_link, 0.015)
    run = fit(client, digits, run_dir, learning=learning(learners="all", min_learners=1))
    until(run, lambda latest: latest.get("incarnation", 0) >= 2 and latest.get("examples_scored", 0) > 1437)
    learner = holder(run)["pid"]
    scorer = next(
        pid for pid in client.run(os.getpid).values() if pid not in (learner, holder(run, "coordinator")["pid"])
    )
    step = run.latest["step"]
    kill(scorer)
    until(run, lambda latest: latest["step"] > step + 500)
    kept, incarnation = committed(run), run.latest["incarnation"]
    kill(holder(run)["pid"])
    until(run, lambda latest: latest["incarnation"] > incarnation and latest["step"] > kept + 100)
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)
    assert lowest_step(run, incarnation + 1) >= kept
