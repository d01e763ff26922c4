"""What is done now and then takes its share of the time, unless it takes so long that the longest pause applies."""

from __future__ import annotations

import contextlib

import pytest

from dask_isgd.learner.pauses import Pauses


@pytest.mark.parametrize(
    ("sparing", "seconds", "pause"),
    [
        *[(False, 0.01, 0.19), (False, 0.4, 7.6), (False, 5.0, 10.0)],
        *[(True, 0.004, 0.19), (True, 0.02, 0.5), (True, 0.03, 0.57), (True, 5.0, 10.0)],
    ],
)
def test_a_pause_leaves_a_share_of_the_time_and_is_not_longer_than_ten_seconds(sparing, seconds, pause):
    now = 100.0
    pauses = Pauses(0.05, clock=lambda: now, sparing=sparing)
    assert pauses.over
    with pauses.timed():
        now += seconds
    now += pause - 1e-6
    assert not pauses.over
    now += 2e-6
    assert pauses.over


def test_what_fails_is_followed_by_no_pause():
    now = 0.0
    pauses = Pauses(0.05, clock=lambda: now)
    with contextlib.suppress(OSError), pauses.timed():
        now += 1.0
        raise OSError
    assert pauses.over


def test_what_takes_long_once_was_kept_waiting():
    now, pauses_seen = 0.0, []
    pauses = Pauses(0.05, clock=lambda: now)
    for seconds in (0.01, 2.0, 0.02, 3.0, 3.0):
        with pauses.timed():
            now += seconds
        ended = now
        while not pauses.over:
            now += 0.01
        pauses_seen.append(now - ended)
    assert pauses_seen == pytest.approx([0.19, 0.19, 0.38, 0.38, 10.0], abs=0.02)
