"""The gain of a candidate proposal from minibatches, whatever they are drawn from and however little is scored."""

from __future__ import annotations

import numpy as np
import pytest

from dask_isgd.config import Sampling
from dask_isgd.sampling import Draw, GainSamples, Gate, ImportanceSampler
from dask_isgd.sampling.gate import PROBES_AFTER
from dask_isgd.sampling.variance import VarianceMonitor, gradient_variance

N, CHUNK = 4000, 100
SETTINGS = {"smoothing": 0.3, "ema_decay": 0.0, "scheme": "independent"}


def scored(norms, chunks=None, **settings):
    sampler = ImportanceSampler(N, CHUNK, Sampling(**{**SETTINGS, **settings}))
    for chunk in range(N // CHUNK) if chunks is None else chunks:
        sampler.update(chunk, norms[chunk * CHUNK : (chunk + 1) * CHUNK], 0)
    return sampler


def closed():
    """A gate that measured no gain."""
    gate = Gate(Sampling())
    for step in range(PROBES_AFTER):
        gate.observe(1.0, step)
    assert gate.probing
    return gate


def measuring_again():
    """A closed gate that had everything scored again at step 5, because of a high ideal gain."""
    gate = closed()
    for _ in range(PROBES_AFTER):
        gate.observe(1.0, 4, ideal=9.0)
    assert gate.scored_since == 5
    return gate


def test_all_draws_are_for_the_curves_and_are_returned_once():
    norms = np.random.default_rng(0).exponential(size=N)
    sampler, gate = scored(norms), Gate(Sampling(gate="open"))
    samples, rng = GainSamples(sampler), np.random.default_rng(1)
    draws = [sampler.draw(8, rng) for _ in range(3)]
    for draw in draws:
        samples.add([draw], norms[draw.indices], gate)
    got, coefficients, candidate = samples.take()
    np.testing.assert_array_equal(got, norms[np.concatenate([draw.indices for draw in draws])])
    np.testing.assert_array_equal(coefficients, np.concatenate([draw.coefficients for draw in draws]))
    np.testing.assert_allclose(candidate.candidate * coefficients, 1, rtol=1e-12)
    got, coefficients, candidate = samples.take()
    assert (len(got), len(coefficients), candidate) == (0, 0, None)


@pytest.mark.parametrize(
    ("gate", "draw", "known"),
    [
        pytest.param(Gate(Sampling(gate="open")), "draw", "scored", id="open: scored chunks"),
        pytest.param(Gate(Sampling()), "draw_uniform", "scored", id="measuring: scored chunks"),
        pytest.param(closed(), "draw_uniform", "probed", id="closed: the chunks scored last"),
        pytest.param(measuring_again(), "draw_uniform", "again", id="measuring again: chunks scored since"),
        pytest.param(Gate(Sampling(uniform=True)), "draw_uniform", "none", id="uniform by configuration"),
        pytest.param(Gate(Sampling(gate="open")), "draw_uniform", "scored", id="drawn while the gate was closed"),
    ],
)
def test_the_candidate_is_judged_on_the_chunks_it_covers(gate, draw, known):
    norms = np.random.default_rng(0).exponential(size=N)
    sampler = scored(norms, chunks=range(20))
    for chunk, version in ((3, 2), (9, 4), (12, 7), (6, 5), (17, 6)):
        sampler.update(chunk, norms[chunk * CHUNK : (chunk + 1) * CHUNK], version)
    samples, rng = GainSamples(sampler), np.random.default_rng(1)
    drawn = getattr(sampler, draw)(512, rng)
    samples.add([drawn], norms[drawn.indices], gate)
    chunks = drawn.indices // CHUNK
    covered = {"scored": range(20), "probed": (12, 17), "again": (12, 6, 17), "none": ()}[known]
    mask = np.isin(chunks, covered)
    _, _, candidate = samples.take()
    if known == "none":
        assert candidate is None
        return
    np.testing.assert_array_equal(candidate.norms, norms[drawn.indices[mask]])
    np.testing.assert_array_equal(candidate.coefficients, drawn.coefficients[mask])
    np.testing.assert_allclose(candidate.candidate, N * sampler.probabilities(drawn.indices[mask]), rtol=1e-12)


def test_in_chunks_never_scored_the_candidate_is_judged_on_what_was_fed_back():
    norms = np.random.default_rng(0).exponential(size=N)
    for chunks in ((), range(20)):
        sampler, rng = scored(norms, chunks=chunks), np.random.default_rng(1)
        fed = rng.permutation(N)[: N // 4]
        sampler.feedback(fed, norms[fed], 3)
        samples, drawn = GainSamples(sampler), sampler.draw_uniform(512, rng)
        samples.add([drawn], norms[drawn.indices], Gate(Sampling()))
        mask = np.isin(drawn.indices, fed) | np.isin(drawn.indices // CHUNK, chunks)
        candidate = samples.take()[2]
        np.testing.assert_array_equal(candidate.norms, norms[drawn.indices[mask]])
        np.testing.assert_allclose(candidate.candidate, N * sampler.probabilities(drawn.indices[mask]), rtol=1e-12)


def test_draws_of_another_proposal_count_with_the_proposal_of_the_sampler():
    """Their coefficients are not those of N examples."""
    norms = np.random.default_rng(0).exponential(size=N)
    sampler = scored(norms)
    samples, indices = GainSamples(sampler), np.arange(0, N, 7)
    q = np.full(len(indices), 1 / 50)
    samples.add([Draw(indices, 1 / (50 * q) * 1.3, q)], norms[indices], Gate(Sampling(gate="open")))
    np.testing.assert_allclose(samples.take()[2].candidate, N * sampler.probabilities(indices), rtol=1e-12)


def test_a_probe_shows_the_gain_of_scoring_everything():
    """A twentieth of the chunks is fresh; the others date from when all norms were equal."""
    rng = np.random.default_rng(2)
    norms = rng.lognormal(sigma=1.0, size=N)
    sampler, probe = scored(np.ones(N)), (11, 27)
    for version, chunk in enumerate(probe, 1):
        sampler.update(chunk, norms[chunk * CHUNK : (chunk + 1) * CHUNK], version)
    gate, samples, monitor = closed(), GainSamples(sampler), VarianceMonitor(decay=0.99)
    for _ in range(200):
        for _ in range(10):
            drawn = sampler.draw_uniform(128, rng)
            samples.add([drawn], norms[drawn.indices], gate)
        monitor.observe_candidate(*samples.take()[2])
    probed = np.concatenate([np.arange(c * CHUNK, (c + 1) * CHUNK) for c in probe])
    weights = sampler.probabilities(probed)
    assert monitor.candidate_gain == pytest.approx(gradient_variance(norms[probed], weights, 0.0).gain, rel=0.05)
    assert monitor.candidate_gain > 1.5
    everything = N * sampler.probabilities()
    assert gradient_variance(norms, everything, 0.0).gain < 1.2, "the stale rest would have hidden it"
