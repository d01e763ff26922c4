"""The workers that take part in a run are those that are there when it begins."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import dask
import pytest
from distributed.comm import CommClosedError

import dask_isgd as isgd
from dask_isgd.checks import cluster
from dask_isgd.checks.cluster import check_cluster
from dask_isgd.errors import ClusterMismatchError, ConfigError

CLOSED = CommClosedError("in <TCP>: Connection reset by peer")


@pytest.fixture
def known_workers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict]]:
    """The scheduler's workers, one entry per call; the last entry stays."""
    found: list[dict[str, dict]] = []
    monkeypatch.setattr(cluster, "workers_of", lambda client: found.pop(0) if len(found) > 1 else found[0])
    return found


def test_a_worker_that_dies_while_it_is_asked_is_no_mistake(known_workers):
    known_workers += [{"alive": {}, "dead": {}}, {"alive": {}, "dead": {}}, {"alive": {}}]
    assert cluster._without_departed(None, {"alive": [], "dead": CLOSED}) == {"alive": []}


def test_one_that_does_not_answer_and_stays_is(known_workers, monkeypatch):
    monkeypatch.setattr(cluster, "_DEPARTURE_SECONDS", 0.2)
    known_workers.append({"alive": {}, "mute": {}})
    answers = {"alive": [], "mute": CLOSED}
    assert cluster._without_departed(None, answers) == answers


def test_a_workers_own_errors_are_its_answer(known_workers):
    known_workers.append({})
    answers = {"a": PermissionError(13, "no"), "b": ValueError("no")}
    assert cluster._without_departed(None, answers) == answers


def spec_of(*, waits_for_scores: bool) -> SimpleNamespace:
    """What the checks use of a specification."""
    return SimpleNamespace(
        learning=isgd.Learning(steps=1),
        scoring=isgd.Scoring(),
        scores=True,
        waits_for_scores=waits_for_scores,
        external=False,
    )


def test_where_the_learners_worker_dies_meanwhile_another_is_waited_for(monkeypatch):
    """Otherwise the run would train on a scorer, since no worker declares the learner's resource any more."""
    learner, scorer = {"nthreads": 2, "resources": {"learner": 1}}, {"nthreads": 1, "resources": {"scorer": 1}}
    there = [{"dead": learner, "scorer": scorer}, {"new": learner, "scorer": scorer}]
    monkeypatch.setattr(cluster, "wait_for_workers", lambda client, learners, external: there.pop(0))
    answering = [{"scorer": 0}, {"scorer": 0}, {"new": 0, "scorer": 0}, {"new": 0, "scorer": 0}]

    def ask(client, function, timeout, *arguments):
        right = [] if arguments else cluster._versions()
        return dict.fromkeys(answering.pop(0), right)

    monkeypatch.setattr(cluster, "ask_workers", ask)
    plan = SimpleNamespace(spec=spec_of(waits_for_scores=False), document={})
    assert check_cluster(None, plan) == {"new": learner, "scorer": scorer}
    assert not answering


def test_where_workers_keep_leaving_the_check_ends(monkeypatch):
    """For example because the scheduler gives them up while they import."""
    learner = {"nthreads": 2, "resources": {"learner": 1}}
    numbers = itertools.count()
    monkeypatch.setattr(
        cluster, "wait_for_workers", lambda client, learners, external: {f"worker-{next(numbers)}": learner}
    )
    monkeypatch.setattr(cluster, "ask_workers", lambda *_: {})
    plan = SimpleNamespace(spec=spec_of(waits_for_scores=False), document={})
    with (
        dask.config.set({"isgd.cluster.timeout": "50 ms"}),
        pytest.raises(ClusterMismatchError, match=r"kept leaving .* for 0.05 s, at last worker-\d+; their logs"),
    ):
        check_cluster(None, plan)
    assert next(numbers) > 1


def test_a_run_that_waits_for_scores_needs_a_thread_that_scores(monkeypatch):
    monkeypatch.setattr(cluster, "wait_for_workers", lambda client, learners, external: {"only": {"nthreads": 1}})
    spec = spec_of(waits_for_scores=True)
    with pytest.raises(ConfigError, match=r"Learning.synchronous: .*one worker with one thread.*--nthreads 2"):
        check_cluster(None, SimpleNamespace(spec=spec, document={}))
