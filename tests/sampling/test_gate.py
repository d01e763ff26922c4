"""When the gate opens and closes."""

from __future__ import annotations

import numpy as np
import pytest

from dask_isgd.config import Sampling
from dask_isgd.sampling import Gate
from dask_isgd.sampling.gate import STATES


def feed(gate, gain, times=40, step=0):
    for i in range(times):
        gate.observe(gain, step + i)
    return gate.open


def test_closed_until_measured():
    gate = Gate(Sampling(gate="auto"))
    assert not gate.open
    assert gate.reason == "measuring, 0 of 20 reports with all weights known"
    assert not feed(gate, 50.0, times=4)
    assert feed(gate, 50.0, times=1)


def test_opens_above_closes_halfway_to_one_and_holds_between():
    gate = Gate(Sampling(gate_gain=1.2))
    assert not feed(gate, 1.15, step=0)
    assert feed(gate, 1.3, step=100)
    assert gate.reason.startswith("open since step 10")
    assert feed(gate, 1.15, step=200), "between the thresholds an open gate stays open"
    assert not feed(gate, 1.05, step=300)
    assert gate.reason.startswith("closed since step 30")
    assert "opens above 1.20" in gate.reason
    assert not feed(gate, 1.15, step=400), "and a closed one closed"


def test_part_of_the_chunks_may_open_it_but_does_not_reduce_scoring():
    """The weights of unscored chunks are a prior: a gain below one is no verdict on importance sampling."""
    gate = Gate(Sampling())
    for step in range(100):
        gate.observe(0.96, step, all_known=False)
    assert not gate.open
    assert not gate.probing
    assert STATES[gate.code] == "measuring"
    again = Gate(Sampling())
    again.restore(gate.state())
    for step in range(19):
        again.observe(0.96, step)
        assert not again.probing
    again.observe(0.96, 20)
    assert again.probing
    assert again.reason.startswith("closed since")
    for step in range(20):
        gate.observe(1.5, step, all_known=False)
    assert gate.open


def test_one_lucky_measurement_opens_nothing():
    gate = Gate(Sampling(gate_gain=1.1))
    feed(gate, 1.0)
    gate.observe(1.4, 50)
    assert not gate.open


@pytest.mark.parametrize("gain", [np.nan, np.inf, 0.0, -1.0])
def test_a_gain_without_meaning_changes_nothing(gain):
    gate = Gate(Sampling())
    feed(gate, 3.0)
    before = gate.state()
    gate.observe(gain, 99)
    assert gate.state() == before | {"reports": before["reports"] + 1}


@pytest.mark.parametrize(
    ("settings", "open_", "reason"),
    [
        ({"gate": "open"}, True, "open by"),
        ({"uniform": True}, False, "uniform by"),
        ({"uniform": True, "gate": "open"}, False, "uniform by"),
    ],
)
def test_a_configured_state_stays(settings, open_, reason):
    gate = Gate(Sampling(**settings))
    for gain in (0.1, 10.0):
        assert feed(gate, gain) is open_
    assert gate.reason.startswith(reason)
    other = Gate(Sampling())
    feed(other, 0.5 if open_ else 9.0)
    gate.restore(other.state())
    assert gate.open is open_


@pytest.mark.parametrize(
    ("settings", "gains", "code", "probing"),
    [
        pytest.param({"uniform": True}, [9.0] * 9, 0, False, id="uniform: nothing is scored at all"),
        pytest.param({"gate": "open"}, [0.5] * 9, 1, False, id="open by configuration"),
        pytest.param({}, [1.0] * 19, 2, False, id="measuring: with all scorers"),
        pytest.param({}, [1.0] * 20, 3, True, id="closed: a probe is enough"),
        pytest.param({}, [2.0] * 5, 4, False, id="open"),
    ],
)
def test_the_code_in_the_history_and_how_much_is_scored(settings, gains, code, probing):
    gate = Gate(Sampling(**settings))
    for step, gain in enumerate(gains):
        gate.observe(gain, step)
    assert (gate.code, gate.probing) == (code, probing)
    assert gate.reason.split()[0].rstrip(",:") == STATES[code].split()[0].rstrip(",:")


def test_state_and_restore():
    first, second = Gate(Sampling()), Gate(Sampling())
    feed(first, 1.3, times=7)
    second.restore(first.state())
    assert second.state() == first.state()
    assert all(type(value) is float for value in first.state().values())
    for gain in (0.9, 1.0, 0.7, 1.01, *[1.0] * 50):
        first.observe(gain, 9, latest=gain, ideal=3.0)
        second.observe(gain, 9, latest=gain, ideal=3.0)
        assert second.state() == first.state()
        assert (first.open, first.gain, first.reason) == (second.open, second.gain, second.reason)


def test_a_closed_gate_measures_again_if_the_ideal_gain_is_high_and_waits_longer_after_each_failure():
    gate, step, ends = Gate(Sampling(gate_gain=1.1)), 0, []
    for step in range(1000):
        before = gate.probing
        gate.observe(1.0, 10 * step, latest=1.0, ideal=1.5)
        if before != gate.probing:
            ends.append(step + 1)
    assert gate.measures_above == pytest.approx(1.4)
    assert ends == [20, 40, 60, 460, 480, 880, 900], "20 reports each, then 20 times as many"
    assert gate.scored_since == 8791


@pytest.mark.parametrize(
    "reports",
    [
        pytest.param([{"ideal": 1.3}] * 100, id="not well above"),
        pytest.param([{"ideal": np.nan}] * 100, id="unknown"),
        pytest.param([{"ideal": 9.0}] * 19, id="not at once: the curves have to settle"),
    ],
)
def test_a_probe_goes_on_without_a_high_ideal_gain(reports):
    gate = Gate(Sampling())
    feed(gate, 1.0, times=20)
    for report in reports:
        gate.observe(1.0, 50, **report)
        assert gate.probing


def test_the_second_measurement_ends_when_all_is_scored_since():
    gate = Gate(Sampling())
    feed(gate, 1.0, times=20)
    for step in range(20):
        gate.observe(1.0, step, ideal=9.0)
    assert gate.reason == "measuring again since step 20, 0 of 20 reports with all weights known"
    for _ in range(50):
        gate.observe(1.0, 50, ideal=9.0, all_known=False)
        assert not gate.probing
    feed(gate, 1.0, times=20)
    assert gate.probing


def test_four_small_gains_in_a_row_close_it_whatever_the_average():
    gate = Gate(Sampling(gate_gain=1.1))
    assert feed(gate, 30.0)
    for latest in (0.9, 0.9, 0.9, 1.2, 0.9, 1.0, 1.04):
        gate.observe(30.0, 50, latest=latest)
    assert gate.open
    gate.observe(30.0, 60, latest=0.9)
    assert not gate.open
    assert gate.reason == "closed since step 60: gain 0.90, opens above 1.10"
    assert not feed(gate, 1.5, times=3, step=70), "the past is forgotten: the average begins again"
    assert feed(gate, 1.5, times=1, step=80)
