"""Variances against per-example gradients of a tiny linear model, taken one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dask_isgd.sampling.variance import Variance, VarianceMonitor, gradient_variance

rng = np.random.default_rng(0)
N = 23
INPUTS, TARGETS, W = rng.normal(size=(N, 4)), rng.normal(size=N), rng.normal(size=4)
GRADIENTS = (INPUTS @ W - TARGETS)[:, None] * INPUTS  # of (x·w - y)²/2
NORMS = np.linalg.norm(GRADIENTS, axis=1)
MEAN = GRADIENTS.mean(axis=0)
STALE = NORMS * rng.uniform(0.5, 2, size=N) + 0.3


def trace(q):
    """Trace of the covariance of g_i/(N q_i), i ~ q, from the definition."""
    draws = GRADIENTS / (N * q[:, None])
    covariance = np.einsum("n,ni,nj->ij", q, draws - MEAN, draws - MEAN)
    return np.trace(covariance)


EXACT = Variance(
    trace(NORMS / NORMS.sum()), trace(STALE / STALE.sum()), trace(np.full(N, 1 / N)), float((MEAN**2).sum())
)


def test_formulas_against_the_covariance_itself():
    got = gradient_variance(NORMS, STALE, float(np.linalg.norm(MEAN)))
    assert got == pytest.approx(EXACT, rel=1e-12)
    assert gradient_variance(NORMS, 1000 * STALE, float(np.linalg.norm(MEAN))) == pytest.approx(EXACT, rel=1e-12)
    assert got.ideal <= got.stale
    assert got.ideal <= got.uniform


def test_gains():
    v = EXACT
    assert v.second_moments.uniform == pytest.approx((NORMS**2).mean())
    assert v.gain == pytest.approx((NORMS**2).mean() / (STALE.mean() * (NORMS**2 / STALE).mean()))
    assert v.ideal_gain == pytest.approx(N * (NORMS**2).sum() / NORMS.sum() ** 2)
    assert Variance(0.0, 0.0, 0.0).gain == 1.0
    assert Variance(0.0, 0.0, 2.0).gain == math.inf


class TestMonitor:
    def test_nothing_is_known_at_first(self):
        monitor = VarianceMonitor()
        assert np.isnan(monitor.variance).all()
        assert math.isnan(monitor.gain)
        assert math.isnan(monitor.candidate_gain)

    def test_the_whole_population_gives_the_exact_numbers_from_the_first_report(self):
        """Every example once with coefficient 1 is the expectation of a uniform draw."""
        monitor = VarianceMonitor()
        for _ in range(3):
            monitor.observe(NORMS, np.ones(N), STALE, EXACT.mean_gradient_sq_norm)
            assert monitor.variance == pytest.approx(EXACT._replace(stale=EXACT.uniform), rel=1e-12)
            assert monitor.gain == pytest.approx(1)
            assert monitor.candidate_gain == pytest.approx(EXACT.gain, rel=1e-12)

    @pytest.mark.parametrize("drawn_from", [np.ones(N), STALE], ids=["closed", "open"])
    def test_long_averages_find_the_exact_numbers(self, drawn_from):
        generator = np.random.default_rng(1)
        q = drawn_from / drawn_from.sum()
        monitor = VarianceMonitor(decay=0.999)
        for _ in range(4000):
            i = generator.choice(N, size=64, p=q)
            monitor.observe(NORMS[i], 1 / (N * q[i]), STALE[i], EXACT.mean_gradient_sq_norm)
        wanted = gradient_variance(NORMS, drawn_from, math.sqrt(EXACT.mean_gradient_sq_norm))
        assert monitor.variance == pytest.approx(wanted, rel=0.03)
        assert monitor.candidate_gain == pytest.approx(EXACT.gain, rel=0.03)

    def test_ideal_never_exceeds_stale(self):
        generator = np.random.default_rng(2)
        monitor = VarianceMonitor()
        for _ in range(200):
            monitor.observe(generator.exponential(size=4), generator.exponential(size=4), None, 0.1)
            assert monitor.variance.ideal <= monitor.variance.stale
        assert math.isnan(monitor.candidate_gain)

    def test_dropped_examples_count_for_neither_side_of_the_candidates_gain(self):
        usable = np.arange(N) % 3 > 0
        monitor = VarianceMonitor()
        monitor.observe(NORMS, np.ones(N), STALE * usable, 0.0)
        wanted = gradient_variance(NORMS[usable], STALE[usable], 0.0).gain
        assert monitor.candidate_gain == pytest.approx(wanted, rel=1e-12)
        before = monitor.candidate_gain
        monitor.observe(NORMS, np.ones(N), np.zeros(N), 0.0)
        assert monitor.candidate_gain == before

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_is_left_out(self, bad):
        monitor = VarianceMonitor()
        monitor.observe(NORMS, np.ones(N), STALE, 0.0)
        before = monitor.state()
        monitor.observe(np.where(np.arange(N) == 3, bad, NORMS), np.ones(N), STALE, 0.0)
        monitor.observe(NORMS, np.ones(N), STALE, bad)
        assert monitor.state() == before

    def test_state_and_restore(self):
        first, second = VarianceMonitor(), VarianceMonitor()
        first.observe(NORMS, np.ones(N), STALE, 0.3)
        second.restore(first.state())
        for monitor in (first, second):
            monitor.observe(STALE, np.ones(N), None, 0.1)
        assert first.state() == second.state()
        assert all(type(value) is float for values in first.state().values() for value in values)


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        (lambda: gradient_variance([1.0], [1.0, 2.0], 0), "1 norms and 2 proposal weights"),
        (lambda: gradient_variance([1.0, 2], [1.0, 0.0], 0), r"smallest proposal weight of 0\.0"),
        (lambda: gradient_variance([], [], 0), r"norms: got shape \(0,\)"),
        (lambda: VarianceMonitor().observe([1.0, 2], [1.0], None, 0), "2 norms and 1 coefficients"),
        (lambda: VarianceMonitor(decay=1.0), r"decay: got 1\.0"),
        (lambda: VarianceMonitor().observe([1.0], [1.0], [-1.0], 0), "candidate: got shape"),
    ],
)
def test_mistakes_are_named(mistake, match):
    with pytest.raises(ValueError, match=match):
        mistake()


class TestErrorBars:
    """Of 400 simulated runs of one population, 90 to 98 % must have the truth inside their 95 % intervals."""

    RUNS, REPORTS, BATCH, SIZE = 400, 40, 256, 3000

    @pytest.mark.parametrize("opened", [True, False], ids=["open", "closed"])
    @pytest.mark.parametrize("tail", [0.5, 1.0], ids=["even", "skewed"])
    def test_coverage(self, opened, tail):
        generator = np.random.default_rng(7)
        norms = generator.lognormal(sigma=tail, size=self.SIZE)
        s = norms * generator.lognormal(sigma=0.4, size=self.SIZE) + 0.3 * norms.mean()
        q = s / s.sum() if opened else np.full(self.SIZE, 1 / self.SIZE)
        mu = 0.4 * norms.mean()
        exact = gradient_variance(norms, q, mu)
        candidate = gradient_variance(norms, s, mu).gain
        truth = np.array([exact.ideal, exact.stale, exact.uniform, exact.gain, candidate])
        hits = np.zeros(5)
        for _ in range(self.RUNS):
            monitor = VarianceMonitor()
            drawn = generator.choice(self.SIZE, size=(self.REPORTS, self.BATCH), p=q)
            for i in drawn:
                noisy = mu**2 * (1 + 0.5 * generator.normal())
                monitor.observe(norms[i], 1 / (self.SIZE * q[i]), s[i] / s.mean(), noisy)
            v = monitor.variance
            shown = np.array([v.ideal, v.stale, v.uniform, monitor.gain, monitor.candidate_gain])
            hits += np.abs(shown - truth) <= np.array(monitor.errors)
        covered = dict(zip(("ideal", "stale", "uniform", "gain", "candidate"), hits / self.RUNS, strict=True))
        if not opened:
            del covered["gain"]  # of uniform draws it is 1 whatever is drawn
            assert monitor.gain == pytest.approx(1)
        assert all(0.90 <= share <= 0.98 for share in covered.values()), covered

    def test_unknown_before_the_second_minibatch(self):
        monitor = VarianceMonitor()
        assert np.isnan(monitor.errors).all()
        monitor.observe(NORMS, np.ones(N), STALE, 0.0)
        assert np.isnan(monitor.errors).all()
        monitor.observe(2 * NORMS, np.ones(N), STALE, 0.0)
        assert np.isfinite(monitor.errors).all()


def test_costs_divide_the_ideal_gain():
    """The whole population drawn once with coefficients 1, as if from the stale proposal: exact second moments."""
    share = 0.25
    fresh = (1 - share) * NORMS / NORMS.mean() + share
    stale = NORMS[::-1] + 0.5
    stale = (1 - share) * stale / stale.mean() + share
    # Many copies, in proportion to q: the mean over draws is then the expectation.
    q = stale / stale.sum()
    copies = np.repeat(np.arange(N), np.maximum(1, np.round(200_000 * q).astype(int)))
    monitor = VarianceMonitor()
    monitor.observe(NORMS[copies], 1 / (N * q[copies]), None, 0.0, uniform_share=share)
    exact, defended = gradient_variance(NORMS, stale, 0.0), gradient_variance(NORMS, fresh, 0.0)
    assert monitor.factors.smoothing == pytest.approx(defended.stale / defended.ideal, rel=1e-3)
    assert monitor.factors.staleness == pytest.approx(exact.stale / defended.stale, rel=1e-3)
    assert monitor.gain * monitor.factors.smoothing * monitor.factors.staleness == pytest.approx(
        monitor.variance.ideal_gain, rel=1e-12
    )
    assert np.isnan(VarianceMonitor().factors).all()
    assert monitor.factors.smoothing >= 1


@pytest.mark.parametrize(("square", "scale"), [(0.5, 7.0), (0.0, None), (-0.1, None)])
def test_the_noise_scale_is_known_if_the_mean_gradient_can_be_told_from_noise(square, scale):
    found = Variance(1.0, 2.0, 3.5, square).noise_scale
    assert math.isnan(found) if scale is None else found == scale


@pytest.mark.parametrize(
    ("traces", "square", "batch", "factor"),
    [
        ((1.0, 2.0, 6.0), 0.0, 8, 3.0),  # noise alone: the gain
        ((1.0, 2.0, 6.0), 1.0, 2, (3.0 + 1.0) / (1.0 + 1.0)),
        ((1.0, 2.0, 6.0), -0.5, 8, 3.0),  # an estimate below zero counts as zero
        ((1.0, 2.0, 6.0), 1e6, 8, pytest.approx(1.0, abs=1e-5)),
        ((1.0, 7.0, 6.0), 0.0, 8, 1.0),  # draws that are worse than uniform ones lower no rate
        ((0.0, 0.0, 0.0), 0.0, 8, 1.0),
        ((math.nan, math.nan, math.nan), math.nan, 8, 1.0),
    ],
)
def test_the_rate_grows_by_what_the_minibatch_s_square_shrinks(traces, square, batch, factor):
    assert Variance(*traces, square).rate_gain(batch) == factor
