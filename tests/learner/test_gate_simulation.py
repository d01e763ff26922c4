"""How soon the gate of a learner follows norms that change, and how seldom it is wrong: in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gate_simulation import BATCH, CHUNK, Simulation

from dask_isgd.sampling.schedule import PROBE_SHARE

CHUNKS = 40
N = CHUNKS * CHUNK
SEEDS = range(4)
EQUAL = np.ones(N)


def heavy(chunk, share=0.02, factor=30.0):
    """Norms of one, but for a share of the examples, which begin with a chunk: an ideal gain of 7.3."""
    norms = EQUAL.copy()
    norms[chunk * CHUNK : chunk * CHUNK + int(share * N)] = factor
    return norms


def jittered(base, sigma, seed):
    """The norms ``base`` times a lognormal factor that no earlier step can predict."""
    cache = {}

    def norms(step):
        if step not in cache:
            if len(cache) > 100:
                del cache[next(iter(cache))]
            cache[step] = base * np.exp(sigma * np.random.default_rng((seed, step)).normal(size=len(base)))
        return cache[step]

    return norms


def closed_simulation(later, seed, **settings):
    """A simulation whose gate has closed on equal norms; those of ``later`` follow at once."""
    changes = 1200 + 37 * seed
    simulation = Simulation(lambda step: EQUAL if step < changes else later, seed=seed, speed=1.0, **settings)
    simulation.run(changes)
    assert simulation.gate.probing
    return simulation


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("feedback", [True, False])
def test_a_closed_gate_finds_heavy_rows_wherever_they_are(seed, feedback):
    """Within three passes of the scorers, of 160 steps each."""
    simulation = closed_simulation(heavy(chunk=7 * seed), seed, feedback=feedback)
    assert simulation.run(480, until=lambda s: s.gate.open) < 480
    simulation.run(800)
    assert simulation.gain() > 3.0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_probe_alone_moves_over_all_chunks_and_finds_them_too(seed):
    """Within one round of the probe: twenty passes."""
    simulation = closed_simulation(heavy(chunk=7 * seed), seed)
    simulation.gate.measures_above = math.inf
    probed, former = np.zeros(CHUNKS, bool), simulation.versions.copy()

    def found(simulation):
        probed[:] |= simulation.versions != former
        return simulation.gate.open

    scored = simulation.examples_scored
    steps = simulation.run(3200, until=found)
    assert steps < 3200
    assert (
        simulation.examples_scored - scored <= (PROBE_SHARE * steps + 1) * simulation.batch * simulation.speed + CHUNK
    )


def test_a_probe_scores_every_chunk_once_per_round():
    simulation = closed_simulation(EQUAL, 0)
    before = simulation.versions.copy()
    simulation.run(3200 + 160)
    assert simulation.gate.probing
    assert (simulation.versions > before).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_an_open_gate_closes_within_300_steps_of_norms_that_became_equal(seed, ema_decay, sigma):
    skewed = np.random.default_rng(seed).lognormal(sigma=sigma, size=N)
    changes = 1000 + 7 * seed
    simulation = Simulation(lambda step: skewed if step < changes else EQUAL, seed=seed, ema_decay=ema_decay)
    simulation.run(changes)
    assert simulation.gate.open
    assert simulation.run(300, until=lambda s: not s.gate.open) < 300
    simulation.run(1500)
    assert not any(simulation.open[changes + 300 :]), "what the averages remember does not open it again"


@pytest.mark.parametrize("reproducible", [False, True], ids=["all steps", "reporting steps"])
@pytest.mark.parametrize("jitter", [0.0, 1.0, 1.5])
def test_norms_that_cannot_be_predicted_hardly_ever_open_the_gate(jitter, reproducible):
    """Ideal gains of 1 to 9.5, of which nothing can be had; scorers stay nearly idle."""
    opened, scored, steps = 0, 0.0, 3000
    for seed in range(3):
        simulation = Simulation(jittered(EQUAL, jitter, seed), seed=seed, speed=2.0, reproducible=reproducible)
        simulation.run(500)
        before = simulation.examples_scored
        simulation.run(steps)
        opened += sum(simulation.open)
        scored += (simulation.examples_scored - before) / (steps * simulation.batch * simulation.speed)
    assert opened / (3 * (steps + 500)) <= (0.02 if jitter > 1 else 0.0)
    # One more measurement, 400 steps and a pass long, is the first to fail.
    assert scored / 3 <= PROBE_SHARE + 2 * 440 / steps


@pytest.mark.parametrize("reproducible", [False, True], ids=["all steps", "reporting steps"])
@pytest.mark.parametrize(("sigma", "jitter"), [(0.7, 0.3), (1.2, 0.5), (1.2, 1.0), (1.5, 0.0)])
def test_where_it_pays_the_gate_opens_and_stays_open(sigma, jitter, reproducible):
    for seed in range(2):
        base = np.random.default_rng(seed).lognormal(sigma=sigma, size=N // 2)
        simulation = Simulation(jittered(base, jitter, seed), seed=seed, reproducible=reproducible)
        simulation.run(1500)
        assert np.mean(simulation.open) > 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_fading_keeps_what_feedback_alone_gains_after_the_scorers_have_died(seed):
    norms = np.random.default_rng(seed).lognormal(sigma=1.0, size=N)
    gains = {}
    for half_life in (None, 500.0):
        simulation = Simulation(lambda _: norms, seed=seed, half_life_steps=half_life)
        simulation.run(1000)
        simulation.speed = 0.0
        simulation.run(4000)
        assert simulation.gate.open
        gains[half_life] = simulation.gain()
    assert gains[500.0] > 1.8
    assert gains[500.0] / gains[None] > 0.9


EPOCH = N // BATCH


@pytest.mark.parametrize("seed", SEEDS)
def test_feedback_alone_opens_the_gate_within_an_epoch(seed):
    """Nothing is ever scored. The ideal gain is 2.7; smoothing leaves 2.0 of it."""
    norms = np.random.default_rng(seed).lognormal(sigma=1.0, size=N)
    simulation = Simulation(lambda _: norms, seed=seed, speed=0.0)
    assert simulation.run(EPOCH, until=lambda s: s.gate.open) < EPOCH
    simulation.run(3 * EPOCH)
    assert simulation.gain() > 1.8
    assert np.mean(simulation.open[EPOCH:]) == 1.0
    assert np.isnan(simulation.sampler.versions).all()


@pytest.mark.parametrize("jitter", [0.0, 1.5])
@pytest.mark.parametrize("seed", range(2))
def test_feedback_alone_of_norms_that_cannot_be_predicted_leaves_the_gate_closed(seed, jitter):
    simulation = Simulation(jittered(EQUAL, jitter, seed), seed=seed, speed=0.0)
    known = simulation.run(5 * EPOCH, until=lambda s: s.gate.probing)
    assert 2 * EPOCH < known < 5 * EPOCH, "that it does not pay is known once nearly all examples were fed back"
    simulation.run(3 * EPOCH)
    assert np.mean(simulation.open) <= 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_feedback_alone_closes_the_gate_and_opens_it_again(seed):
    skewed = np.random.default_rng(seed).lognormal(sigma=1.0, size=N)
    changes = 3 * EPOCH, 7 * EPOCH
    simulation = Simulation(lambda step: EQUAL if changes[0] <= step < changes[1] else skewed, seed=seed, speed=0.0)
    simulation.run(changes[0])
    assert simulation.gate.open
    assert simulation.run(300, until=lambda s: not s.gate.open) < 300
    simulation.run(changes[1] - simulation.step)
    assert not simulation.gate.open
    assert simulation.run(2 * EPOCH, until=lambda s: s.gate.open) < 2 * EPOCH
