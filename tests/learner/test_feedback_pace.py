"""How often norms are computed, by what they cost."""

from __future__ import annotations

import pytest

from dask_isgd.learner.feedback_pace import FeedbackPace

BLOCK = 8


def share(pace: FeedbackPace, first: int, blocks: int, *, cost: float, noise: float = 0.0) -> float:
    """Take ``blocks`` blocks whose steps last 1 s, and ``cost`` more with norms; return the share of those."""
    chosen = 0
    for number in range(blocks):
        steps = range(first + number * BLOCK, first + (number + 1) * BLOCK)
        with_norms = sum(pace.norms(step) for step in steps)
        chosen += with_norms
        # every fifth block is disturbed
        pace.took(steps[-1] + 1, 1.0 + cost * with_norms / BLOCK + noise * (number % 5 == 1))
    return chosen / (blocks * BLOCK)


@pytest.mark.parametrize(("cost", "every"), [(-0.05, 1), (0.0, 1), (0.09, 1), (0.15, 2), (0.2, 2), (0.45, 5), (5.0, 8)])
@pytest.mark.parametrize("noise", [0.0, 20.0])
def test_norms_take_a_tenth_of_the_time_at_most(cost, every, noise):
    pace = FeedbackPace()
    assert share(pace, 0, 12, cost=cost, noise=noise) > 0.4, "while both are timed, half of the steps have norms"
    assert pace.every == every
    assert share(pace, 12 * BLOCK, 100, cost=cost) == pytest.approx(1 / every, abs=0.05)


@pytest.mark.parametrize(("cost", "every"), [(0.25, 1), (0.45, 2), (5.0, 8)])
def test_where_nothing_is_scored_norms_may_take_three_times_as_much(cost, every):
    pace = FeedbackPace(alone=lambda: True)
    share(pace, 0, 12, cost=cost)
    assert pace.every == every


def test_scores_that_arrive_later_make_norms_rarer_at_once():
    scored = False
    pace = FeedbackPace(alone=lambda: not scored)
    share(pace, 0, 12, cost=0.25)
    assert pace.every == 1
    scored = True
    share(pace, 12 * BLOCK, 2, cost=0.25)
    assert pace.every == 3


def test_the_cost_is_measured_again():
    pace = FeedbackPace()
    share(pace, 0, 12, cost=0.45)
    assert pace.every == 5
    share(pace, 12 * BLOCK, 1000, cost=0.05)
    assert pace.every == 1


def test_a_fixed_pace_computes_all_norms_whatever_they_cost():
    pace = FeedbackPace(fixed=True)
    assert share(pace, 0, 1000, cost=5.0) == 1.0
