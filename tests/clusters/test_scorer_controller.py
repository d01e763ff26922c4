"""How many scorers: more while that raises the gain, fewer while it does not. No cluster, no clock."""

from __future__ import annotations

import math

import pytest

from dask_isgd.clusters.scorer_controller import GainReport, ScorerController
from dask_isgd.errors import ConfigError

CLOSED = GainReport(open=False, gain=1.0, ideal=3.0)
STALE = GainReport(open=True, gain=2.0, ideal=3.0)
FRESH = GainReport(open=True, gain=2.99, ideal=3.0)


@pytest.mark.parametrize(
    ("scorers", "runs", "target", "reason"),
    [
        (8, [CLOSED], 1, "one stays to probe while the gate is closed"),
        (8, [CLOSED, CLOSED], 1, "of every run"),
        (8, [], 8, "no report: nothing changes"),
        (0, [], 1, "one is needed to get any report"),
        (8, [STALE], 12, "staleness costs a third of the gain: half as many again"),
        (1, [STALE], 2, "at least one more"),
        (8, [FRESH], 7, "as good as ideal: one can go"),
        (1, [FRESH], 1, "the last one stays"),
        (8, [FRESH, STALE], 12, "the run that is worst off decides"),
        (8, [CLOSED, STALE], 12, "a closed gate does not affect the others"),
        (8, [GainReport(open=True, gain=math.nan, ideal=2.0)], 8, "no gain yet"),
    ],
)
def test_first_answer(scorers, runs, target, reason):
    assert ScorerController().target(100.0, scorers, runs) == target, reason


def test_it_changes_the_number_once_per_interval():
    controller = ScorerController(settle=30)
    assert controller.target(0.0, 4, [STALE]) == 6
    assert controller.target(29.0, 6, [STALE]) == 6


def test_scorers_that_raise_no_gain_are_removed_and_not_tried_again_soon():
    controller = ScorerController(settle=30, hold=300)
    assert controller.target(0.0, 4, [STALE]) == 6
    assert controller.target(30.0, 6, [STALE]) == 4
    assert controller.target(60.0, 4, [STALE]) == 4
    assert controller.target(331.0, 4, [STALE]) == 6


def test_scorers_that_raise_the_gain_are_kept_and_the_climb_continues():
    controller = ScorerController()
    assert controller.target(0.0, 4, [STALE]) == 6
    assert controller.target(30.0, 6, [GainReport(open=True, gain=2.3, ideal=3.0)]) == 9


@pytest.mark.parametrize("settings", [{"settle": 0}, {"hold": 1, "settle": 2}, {"least_rise": -1}])
def test_impossible_settings(settings):
    with pytest.raises(ConfigError, match="wanted 0 < settle"):
        ScorerController(**settings)
