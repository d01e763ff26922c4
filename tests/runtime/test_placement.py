"""Who scores, and how many tasks at a time, while workers come and go."""

from __future__ import annotations

import pytest

import dask_isgd as isgd
from dask_isgd.runtime import placement
from dask_isgd.runtime.placement import ScorerPool, can_score, note_on_sharing

LEARNER = {"nthreads": 2, "resources": {"learner": 1.0}}
SCORER = {"nthreads": 3, "resources": {"scorer": 2.0}}
PLAIN = {"nthreads": 4}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """The workers of the cluster, read again on each call."""
    workers: dict[str, dict] = {}
    monkeypatch.setattr(placement, "workers_of", lambda client: dict(workers))
    monkeypatch.setattr(placement, "_REFRESH_SECONDS", 0.0)
    return workers


def test_capacity_follows_the_scorers_that_are_there(there):
    scorers = ScorerPool(None, isgd.Scoring(in_flight=2))
    there.update(learner=LEARNER, one=SCORER, two=SCORER)
    assert (scorers.addresses(), scorers.capacity()) == (["one", "two"], 8)
    assert scorers.placement() == {"resources": {"scorer": 0.25}}, "one task is scored, others read and write"
    del there["one"], there["two"]  # the last scorers leave while their capacity is asked for
    assert scorers.capacity() == 4
    there.update(three=SCORER)
    assert scorers.capacity() == 4


def test_without_resources_the_learner_is_kept_off(there):
    scorers = ScorerPool(None, isgd.Scoring(in_flight=1))
    scorers.learner = "a"
    there.update(a=PLAIN, b=PLAIN)
    assert (scorers.addresses(), scorers.capacity()) == (["b"], 4)
    del there["b"]
    assert scorers.capacity() == 4


@pytest.mark.parametrize("resources", [{}, {"learner": 1.0, "scorer": 1.0}])
def test_the_only_worker_scores_nothing_if_feedback_is_enough(there, resources):
    worker = {"nthreads": 4, "resources": resources}
    scorers = ScorerPool(None, isgd.Scoring(in_flight=1), alone=False)
    scorers.learner = "a"
    there.update(a=worker)
    assert (scorers.addresses(), scorers.capacity()) == (["a"], 0), "it still evaluates"
    there.update(b=worker)
    assert (scorers.addresses(), scorers.capacity()) == (["b"], 1 if resources else 4)


def test_workers_of_several_learners_score_only_if_there_is_no_other(there):
    both = {"nthreads": 2, "resources": {"learner": 1.0, "scorer": 1.0}}
    scorers = ScorerPool(None, isgd.Scoring(in_flight=1), alone=False, together=True)
    scorers.learner = "a"
    there.update(a=both, b=both)
    assert (scorers.addresses(), scorers.capacity()) == (["a", "b"], 0), "they still evaluate"
    there.update(c=SCORER)
    assert (scorers.addresses(), scorers.capacity()) == (["c"], 2)
    assert scorers.placement()["workers"] == ["c"]


def test_workers_that_could_learn_score_once_it_is_known_who_learns(there):
    both = {"nthreads": 2, "resources": {"learner": 1.0, "scorer": 1.0}}
    scorers = ScorerPool(None, isgd.Scoring(in_flight=1), alone=False, together=True)
    scorers.learner, scorers.learners = "a", {"a", "b"}
    there.update(a=both, b=both, c=both)
    assert (scorers.addresses(), scorers.capacity()) == (["c"], 1)
    assert scorers.placement()["workers"] == ["c"]
    scorers.learners = {"a", "b", "c"}
    assert scorers.capacity() == 0


def test_who_can_score_declares_what_scoring_asks_for():
    both = {"nthreads": 2, "resources": {"learner": 1.0, "scorer": 1.0}}
    assert can_score(both, isgd.Scoring())
    assert not can_score(LEARNER, isgd.Scoring())
    assert not can_score(both, isgd.Scoring(resources={"gpu": 1}))
    assert can_score({"nthreads": 1, "resources": {"gpu": 1.0}}, isgd.Scoring(resources={"gpu": 1}))


@pytest.mark.parametrize(
    ("workers", "feedback", "note"),
    [
        ({"a": {"nthreads": 1}}, True, "nothing is scored, and weights come from the learner's minibatches; its only"),
        ({"a": {"nthreads": 1}}, False, "nothing is scored; its only thread is the learner's"),
        ({"a": {"nthreads": 2}}, True, "nothing is scored, and weights come from the learner's minibatches"),
        ({"a": {"nthreads": 2}}, False, "scoring shares it with the learner"),
        ({"a": {"nthreads": 1}, "b": {"nthreads": 1}}, False, None),
    ],
)
def test_what_is_said_of_a_cluster_of_one(workers, feedback, note):
    found = note_on_sharing(workers, feedback=feedback)
    assert found is note or found.startswith(note)
