"""When the gate opens and closes."""

from __future__ import annotations

import numpy as np
import pytest

from dask_isgd.config import Sampling
from dask_isgd.sampling import Gate
from dask_isgd.sampling.gate import STATES
from dask_isgd.sampling.variance import VarianceMonitor


def feed(gate, gain, times=40, step=0):
    for i in range(times):
        gate.observe(gain, step + i)
    return gate.open


def test_closed_until_measured():
    gate = Gate(Sampling(gate="auto"))
    assert not gate.open
    assert gate.reason == "measuring, 0 of 20 observations with all chunks scored"
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
        gate.observe(0.96, step, all_scored=False)
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
        gate.observe(1.5, step, all_scored=False)
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
    assert gate.state() == before


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
    for gain in (0.9, 1.0, 0.7, 1.01):
        first.observe(gain, 9)
        second.observe(gain, 9)
        assert (first.open, first.gain, first.reason) == (second.open, second.gain, second.reason)


def test_with_measured_gains_it_stays_closed_on_equal_norms_opens_on_skewed_ones_and_closes_again():
    """Draws are uniform while it is closed, as in a learner; the candidate knows the norms up to noise."""
    rng = np.random.default_rng(0)
    sampling = Sampling()
    gate, monitor = Gate(sampling), VarianceMonitor()

    def reports(norms, times):
        for step in range(times):
            stale = norms * np.exp(0.2 * rng.normal(size=len(norms))) + 0.5 * norms.mean()
            q = stale / stale.sum() if gate.open else np.full(len(norms), 1 / len(norms))
            drawn = rng.choice(len(norms), size=128, p=q)
            monitor.observe(norms[drawn], 1 / (len(norms) * q[drawn]), stale[drawn] / stale.mean(), 0.0)
            gate.observe(monitor.candidate_gain, step)
        return gate.open

    assert not reports(np.ones(2000), 60)
    assert reports(rng.exponential(size=2000) ** 1.5, 60)
    assert not reports(np.ones(2000), 120)
