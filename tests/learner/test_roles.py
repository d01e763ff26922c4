"""Which workers score that could learn: the rule, without a cluster."""

from __future__ import annotations

import math

import pytest

from dask_isgd.learner.group.roles import AGAIN, MARGIN, VALUE, Choice, Measured, Roles


def judge(now: Measured | None, workers: int = 4, scorers: int = 0, most: int | None = None, **changes) -> Choice:
    """The second of two judgements of a run whose ideal gain is 4."""
    roles = changes.pop("roles", None) or Roles()
    options = {"at": 0.0, "ideal_gain": 4.0, "pays": True, **changes}
    found = [roles.judge(workers, scorers, workers - 1 if most is None else most, now, **options) for _ in range(2)]
    return found[-1]


def measured(seconds: float, waiting: float, share: float) -> Measured:
    """Figures of rank 0, which computes whenever it doesn't wait."""
    return Measured(seconds, seconds - waiting, share)


def begun() -> Roles:
    """Roles of a run that began at 0, and was judged then."""
    roles = Roles()
    judge(None, roles=roles)
    return roles


def test_where_learners_share_their_work_well_all_learn():
    choice = judge(measured(seconds=0.010, waiting=0.0005, share=0.5))
    assert choice.scorers == 0
    assert choice.worth < 1.0
    assert "all 4 learn" in choice.reason
    assert "10 ms, 5% of it waiting, with 50% of the ideal gain" in choice.reason


def test_where_most_of_a_step_is_waiting_one_learns_and_waits_for_nobody():
    choice = judge(measured(seconds=0.010, waiting=0.009, share=0.4))
    assert choice.scorers == 3
    assert choice.worth == pytest.approx(0.010 / 0.004 * (0.7 / 0.4) ** VALUE), "half-way to the ideal gain"
    assert choice.reason.startswith("3 of 4 score: that promises")


def test_one_scorer_of_many_is_worth_it_if_the_weights_are_bad():
    """A step of ten learners becomes a ninth longer, at most, and the gain may be five times as large."""
    assert judge(measured(seconds=0.010, waiting=0.0, share=0.1), workers=10).scorers == 1
    assert judge(measured(seconds=0.010, waiting=0.0, share=0.8), workers=10).scorers == 0


@pytest.mark.parametrize(("most", "chosen"), [(0, 0), (1, 1), (2, 1), (3, 3)])
def test_no_more_score_than_may(most, chosen):
    """Two learners of four wait as long as three, and only one waits for nobody."""
    assert judge(measured(seconds=0.010, waiting=0.009, share=0.05), most=most).scorers == chosen


def test_a_promise_within_the_noise_changes_nothing():
    waiting = 1.0 - 0.5 / MARGIN  # of two: the step of one takes as long as the margin says
    for more, chosen in ((-0.01, 0), (0.01, 1)):
        now = measured(seconds=1.0, waiting=waiting + more, share=1.0)
        assert judge(now, workers=2).scorers == chosen


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        (None, {}),
        (measured(0.01, 0.009, math.nan), {}),
        (measured(0.01, 0.009, 0.0), {}),
        (measured(0.01, 0.0101, 0.4), {}),  # clocks differ
        (measured(0.01, 0.009, 0.4), {"ideal_gain": math.nan}),
    ],
)
@pytest.mark.parametrize("scorers", [0, 2])
def test_nothing_changes_while_nothing_is_measured(now, changes, scorers):
    assert judge(now, scorers=scorers, **changes)[:2] == (scorers, pytest.approx(math.nan, nan_ok=True))


def test_if_draws_are_uniform_all_learn():
    assert judge(measured(0.01, 0.009, 0.4), scorers=2, pays=False).scorers == 0
    assert judge(measured(0.01, 0.009, 0.4), scorers=1, most=0).scorers == 0


def test_one_measurement_alone_changes_nothing():
    roles, together = Roles(), measured(seconds=0.010, waiting=0.009, share=0.4)
    odd = measured(seconds=0.010, waiting=0.0, share=0.4)
    seen = [together, odd, together, together]
    found = [roles.judge(4, 0, 3, now, at=10.0 + i, ideal_gain=4.0, pays=True) for i, now in enumerate(seen)]
    assert [choice.scorers for choice in found] == [0, 0, 0, 3]


def test_what_was_tried_is_judged_by_what_was_measured():
    roles, together = begun(), measured(seconds=0.010, waiting=0.007, share=0.4)
    assert judge(together, workers=2, roles=roles, at=10.0).scorers == 1
    # it was worse than predicted: the one learner is slower than two, and the gain did not rise
    apart = measured(seconds=0.012, waiting=0.0, share=0.4)
    back = judge(apart, workers=2, scorers=1, roles=roles, at=20.0)
    assert (back.scorers, back.worth) == (0, pytest.approx(1.2))
    assert judge(together, workers=2, roles=roles, at=30.0).scorers == 0, "although the prediction is what it was"


def test_what_failed_is_tried_again_after_twenty_times_as_long():
    roles, together = begun(), measured(seconds=0.010, waiting=0.007, share=0.4)
    assert judge(together, workers=2, roles=roles, at=10.0).scorers == 1
    assert judge(None, workers=2, scorers=1, roles=roles, at=14.0).scorers == 1
    assert judge(measured(0.03, 0.0, 0.4), workers=2, scorers=1, roles=roles, at=15.0).scorers == 0
    found = {at: judge(together, workers=2, roles=roles, at=float(at)).scorers for at in range(16, 200)}
    assert min(at for at, scorers in found.items() if scorers) == 15 + 5 * AGAIN


def test_one_that_learns_alone_knows_how_long_several_waited_and_what_scores_are_worth():
    roles = begun()
    assert judge(measured(0.030, 0.027, 0.1), workers=3, roles=roles, at=10.0).scorers == 2
    found = judge(measured(0.009, 0.0, 0.2), workers=3, scorers=2, roles=roles, at=20.0)
    assert found.scorers == 2
    assert found.worth == pytest.approx(0.009 / (0.0045 + 0.027)), "two learners, and no better weights than now"


def test_other_workers_are_another_case():
    roles, together = begun(), measured(seconds=0.010, waiting=0.007, share=0.4)
    judge(measured(1.0, 0.0, 0.4), workers=2, scorers=1, roles=roles, at=10.0)
    assert judge(together, workers=2, roles=roles, at=11.0).scorers == 0
    assert judge(together, workers=3, roles=roles, at=12.0).scorers == 2
