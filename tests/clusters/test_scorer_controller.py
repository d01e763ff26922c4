"""How many scorers: more while that pays, fewer while it does not. No cluster, no clock."""

from __future__ import annotations

import math

import pytest

from dask_isgd.clusters.scorer_controller import GainReport, ScorerController
from dask_isgd.errors import ConfigError

CLOSED = GainReport(open=False, gain=1.0, ideal=3.0)
STALE = GainReport(open=True, gain=2.0, ideal=3.0)
FRESH = GainReport(open=True, gain=2.99, ideal=3.0)


@pytest.mark.parametrize(
    ("scorers", "runs", "wanted", "why"),
    [
        (8, [CLOSED], 1, "one goes on probing while the gate is shut"),
        (8, [CLOSED, CLOSED], 1, "of every run"),
        (8, [], 8, "nothing was heard: nothing changes"),
        (0, [], 1, "one is needed to hear anything"),
        (8, [STALE], 12, "staleness costs a third of the gain: half as many again"),
        (1, [STALE], 2, "at least one more"),
        (8, [FRESH], 7, "as good as ideal: one can go"),
        (1, [FRESH], 1, "the last one stays"),
        (8, [FRESH, STALE], 12, "the run that is worst off decides"),
        (8, [CLOSED, STALE], 12, "a shut gate says nothing of the others' need"),
        (8, [GainReport(open=True, gain=math.nan, ideal=2.0)], 8, "no figure yet"),
    ],
)
def test_first_answer(scorers, runs, wanted, why):
    assert ScorerController().target(100.0, scorers, runs) == wanted, why


def test_it_changes_its_mind_once_in_a_while():
    controller = ScorerController(settle=30)
    assert controller.target(0.0, 4, [STALE]) == 6
    assert controller.target(29.0, 6, [STALE]) == 6


def test_more_that_brought_nothing_are_given_back_and_not_asked_for_again_soon():
    controller = ScorerController(settle=30, hold=300)
    assert controller.target(0.0, 4, [STALE]) == 6
    assert controller.target(30.0, 6, [STALE]) == 4
    assert controller.target(60.0, 4, [STALE]) == 4
    assert controller.target(331.0, 4, [STALE]) == 6


def test_more_that_brought_gain_are_kept_and_the_climb_goes_on():
    controller = ScorerController()
    assert controller.target(0.0, 4, [STALE]) == 6
    assert controller.target(30.0, 6, [GainReport(open=True, gain=2.3, ideal=3.0)]) == 9


@pytest.mark.parametrize("settings", [{"settle": 0}, {"hold": 1, "settle": 2}, {"least_rise": -1}])
def test_impossible_settings(settings):
    with pytest.raises(ConfigError, match="wanted 0 < settle"):
        ScorerController(**settings)
