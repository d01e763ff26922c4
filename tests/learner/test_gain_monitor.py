"""What the learner measures from its own minibatches: variances, gains and the gate that follows them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dask_isgd.config import Sampling
from dask_isgd.learner.gain_monitor import GainMonitor
from dask_isgd.learner.reporter import COLUMNS
from dask_isgd.learner.step import Learned, Step
from dask_isgd.sampling import Gate, ImportanceSampler

N, CHUNK, BATCH = 1000, 100, 64
NORMS = np.random.default_rng(0).exponential(size=N) ** 2


def monitor_of(*, scored: bool = True, reproducible: bool = False, **settings) -> tuple[ImportanceSampler, GainMonitor]:
    sampling = Sampling(smoothing=0.1, **settings)
    sampler = ImportanceSampler(N, CHUNK, sampling)
    if scored:
        for chunk in range(N // CHUNK):
            sampler.update(chunk, NORMS[chunk * CHUNK : (chunk + 1) * CHUNK], 0)
    return sampler, GainMonitor(sampler, Gate(sampling), reproducible=reproducible)


def train(sampler, monitor, steps, *, every=10, seed=1, mean_square=0.0, norms=NORMS):
    generator = np.random.default_rng(seed)
    for step in range(steps):
        kind = "independent"
        gate = monitor._gate
        draw = (sampler.draw if gate.open else sampler.draw_uniform)(BATCH, generator, kind)
        measure = (step + 1) % every == 0
        result = Step(1.0, norms[draw.indices], mean_square if measure else math.nan, 1.0, False)
        monitor.observe([Learned(step, draw, result, measure)])


def test_every_value_of_the_row_is_a_column_of_the_history():
    sampler, monitor = monitor_of()
    assert set(monitor.row(0)) <= set(COLUMNS)
    train(sampler, monitor, 20)
    assert all(type(value) is float for value in monitor.row(20).values())


def test_nothing_is_known_before_the_first_report():
    row = monitor_of(scored=False)[1].row(0)
    assert all(math.isnan(row[name]) for name in ("variance_ideal", "gain", "candidate_gain", "gate_gain"))
    assert (row["gate"], row["scored_fraction"]) == (0.0, 0.0)


def test_the_gate_opens_at_the_gain_of_the_proposal():
    """The gain of draws by the norms themselves, smoothed by a tenth, against its exact value."""
    sampler, monitor = monitor_of()
    q = sampler.probabilities()
    exact = (NORMS**2).mean() / (NORMS**2 / (N**2 * q)).sum()
    train(sampler, monitor, 400)
    row = monitor.row(400)
    assert row["candidate_gain"] == pytest.approx(exact, rel=0.15)
    assert row["gain"] == pytest.approx(exact, rel=0.15), "the gate is open, so draws follow the proposal"
    assert row["gate"] == 1.0


def test_a_proposal_that_does_not_help_leaves_the_gate_closed():
    sampler, monitor = monitor_of()
    train(sampler, monitor, 400, norms=np.ones(N))
    row = monitor.row(400)
    assert row["gate"] == 0.0
    assert row["candidate_gain"] < 1.0


@pytest.mark.parametrize(("reproducible", "used"), [(False, 4 * BATCH), (True, BATCH)])
def test_only_a_reproducible_run_ignores_the_steps_between_reports(reproducible, used, monkeypatch):
    sampler, monitor = monitor_of(reproducible=reproducible)
    sizes = []
    monkeypatch.setattr(monitor._variance, "observe", lambda norms, *rest, **more: sizes.append(len(norms)))
    train(sampler, monitor, 8, every=4)
    assert sizes == [used, used]


def test_a_report_without_an_estimate_of_the_mean_gradient_is_not_measured():
    sampler, monitor = monitor_of()
    train(sampler, monitor, 20, mean_square=math.nan)
    assert math.isnan(monitor.row(20)["gain"])
    train(sampler, monitor, 20)
    assert monitor.row(20)["gain"] > 0


def test_a_restored_monitor_continues_to_the_bit():
    (one_sampler, one), (two_sampler, two) = monitor_of(reproducible=True), monitor_of(reproducible=True)
    train(one_sampler, one, 100)
    two.restore(json.loads(json.dumps(one.state())))
    assert two.row(100) == one.row(100)
    train(one_sampler, one, 100, seed=2)
    train(two_sampler, two, 100, seed=2)
    assert two.row(200) == one.row(200)
