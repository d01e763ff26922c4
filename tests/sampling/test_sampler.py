"""What the sampler promises, one chunk, one minibatch, one mistake at a time."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from sampling_oracle import Oracle
from scipy.stats import chi2

from dask_isgd.config import Sampling
from dask_isgd.errors import (
    DataError,
    EmptyDatasetError,
    LengthMismatchError,
    NonFiniteNormsError,
)
from dask_isgd.sampling import Draw, ImportanceSampler
from dask_isgd.sampling import sampler as sampler_module
from dask_isgd.sampling.variance import square_of_mean


class Positions:
    """A stand-in for a generator that returns given positions in [0, 1)."""

    def __init__(self, at):
        self.at = np.asarray(at, np.float64)

    def random(self, size=None):
        return self.at if size is not None else float(self.at)

    def permutation(self, n):
        return np.arange(n)


def fill(sampler, weights, version=0):
    for chunk in range(sampler.n_chunks):
        start = chunk * sampler.chunk_size
        sampler.update(chunk, weights[start : start + sampler.chunk_size], version)


def sampler_of(weights, chunk_size, **settings):
    sampler = ImportanceSampler(len(weights), chunk_size, Sampling(**{"ema_decay": 0.0, **settings}))
    fill(sampler, np.asarray(weights))
    return sampler


def inverse_cdf_edges(sampler):
    """(n + 1,) positions at which the drawn index changes, by bisection of the map itself."""
    low, high = np.zeros(sampler.n - 1), np.ones(sampler.n - 1)
    wanted = np.arange(sampler.n - 1)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = sampler.draw(len(middle), Positions(np.minimum(middle, np.nextafter(1, 0)))).indices > wanted
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.concatenate([[0.0], high, [1.0]])


SETTINGS = {
    "smoothing": {"smoothing": 0.5},
    "no smoothing": {"smoothing": 0.0},
    "largest coefficient": {"smoothing": 0.0, "max_coefficient": 3.0},
    "effective sample size": {"smoothing": 0.0, "ess_fraction": 0.8},
    "fading": {"smoothing": 0.1, "half_life_steps": 7.0},
    "square root": {"smoothing": 0.1, "exponent": 0.5},
    "fourth power": {"smoothing": 0.1, "exponent": 4.0},
    "ema_decay": {"smoothing": 0.1, "ema_decay": 0.7},
    "all at once": {
        "smoothing": 0.01,
        "max_coefficient": 9.0,
        "ess_fraction": 0.5,
        "half_life_steps": 3.0,
        "exponent": 2.0,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_draw_is_unbiased_by_exact_expectation(settings):
    """The probability of each index is measured on the map from positions to indices, not taken from the sampler."""
    rng = np.random.default_rng(1)
    n = 173
    sampler = ImportanceSampler(n, 70, Sampling(scheme="independent", **settings))
    sampler.update(0, rng.exponential(size=70), 2)
    sampler.update(2, rng.exponential(size=33), 9)
    sampler.feedback([75, 3], [4.0, 0.0], 11)
    sampler.refresh(13)

    q = np.diff(inverse_cdf_edges(sampler))

    np.testing.assert_allclose(q, sampler.probabilities(), rtol=0, atol=1e-12)
    drawn = sampler.draw(n, Positions(np.cumsum(q) - q / 2))
    np.testing.assert_array_equal(drawn.indices, np.arange(n))
    gradients = rng.normal(size=(n, 5))
    np.testing.assert_allclose((q * drawn.coefficients) @ gradients, gradients.mean(axis=0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_proposal_weights_are_the_definition(settings):
    rng = np.random.default_rng(2)
    sampling = Sampling(**settings)
    sampler, oracle = ImportanceSampler(173, 70, sampling), Oracle(173, 70, sampling)
    for chunk, version in ((0, 3), (2, 8)):
        norms = rng.exponential(size=sampler.weights(chunk).size)
        sampler.update(chunk, norms, version)
        oracle.update(chunk, norms, version)
    oracle.step = 12
    sampler.refresh(12)
    s, _ = oracle.proposal()
    np.testing.assert_allclose(np.concatenate([sampler.weights(k) for k in range(3)]), s, rtol=1e-12)
    np.testing.assert_allclose(sampler.probabilities(), s / s.sum(), rtol=1e-11)
    assert abs(sampler.probabilities().sum() - 1) < 1e-12


@pytest.mark.parametrize("draw", ["stratified", "systematic"])
def test_expected_inclusions_of_strata_are_batch_times_q(draw):
    """Averaged over a grid of offsets; each edge of an index's interval can be off by one cell."""
    rng = np.random.default_rng(3)
    sampler = sampler_of(rng.exponential(size=40), 15, scheme=draw)
    batch, grid = 7, 1500
    counts = np.zeros(40)
    for offset in (np.arange(grid) + 0.5) / grid:
        at = np.full(batch, offset) if draw == "stratified" else offset
        drawn = sampler.draw(batch, Positions(at))
        np.add.at(counts, drawn.indices, 1.0 / grid)
        np.testing.assert_allclose(drawn.coefficients, 1 / (40 * drawn.probabilities), rtol=1e-14)
    edges = np.concatenate([[0.0], np.cumsum(sampler.probabilities())]) * batch
    pieces = 2 + np.floor(edges[1:]) - np.floor(edges[:-1])
    assert (np.abs(counts - batch * sampler.probabilities()) <= pieces / grid).all()


def test_independent_draws_pass_chi_square():
    """60 cells, 400,000 draws, seed fixed; a right sampler fails for one seed in a thousand."""
    sampler = sampler_of(np.random.default_rng(4).exponential(size=60), 23, scheme="independent")
    drawn = sampler.draw(400_000, np.random.default_rng(5))
    expected = 400_000 * sampler.probabilities()
    statistic = ((np.bincount(drawn.indices, minlength=60) - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(1e-3, 59)


@pytest.mark.parametrize("draw", ["stratified", "independent", "systematic"])
@pytest.mark.parametrize(("n", "batch"), [(1, 1), (1, 9), (5, 64), (1000, 64)])
def test_uniform_draws_have_coefficient_one(draw, n, batch):
    sampler = ImportanceSampler(n, 4, Sampling(scheme=draw))
    drawn = sampler.draw_uniform(batch, np.random.default_rng(0))
    assert isinstance(drawn, Draw)
    assert (drawn.coefficients == 1).all()
    assert (drawn.probabilities == 1 / n).all()
    assert drawn.indices.dtype == np.int64
    assert drawn.indices.min() >= 0
    assert drawn.indices.max() < n
    if draw == "stratified" and n >= batch:
        assert len(np.unique(drawn.indices * batch // n)) > batch / 2


def test_a_uniform_run_draws_uniformly_whatever_the_weights():
    sampler = sampler_of([1.0, 100.0], 2, uniform=True)
    assert (sampler.draw(50, np.random.default_rng(0)).coefficients == 1).all()
    assert not sampler.biased


def test_with_nothing_scored_draws_are_uniform_and_nothing_is_logged(caplog):
    sampler = ImportanceSampler(10, 3, Sampling())
    np.testing.assert_allclose(sampler.probabilities(), 0.1)
    np.testing.assert_allclose(sampler.draw(8, np.random.default_rng(0)).coefficients, 1)
    assert not caplog.records


def test_unscored_examples_are_drawn_as_the_mean_of_the_scored():
    sampler = ImportanceSampler(6, 3, Sampling(smoothing=0.0))
    sampler.update(0, [1.0, 2.0, 6.0], 0)
    np.testing.assert_allclose(sampler.weights(1), 3.0, rtol=2e-6)


def test_all_zero_weights_draw_uniformly_with_one_warning(caplog):
    sampler = sampler_of(np.zeros(10), 3)
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            drawn = sampler.draw(32, np.random.default_rng(seed))
            sampler.update(0, np.zeros(3), seed)
            assert drawn.indices.max() < 10
            np.testing.assert_allclose(drawn.coefficients, 1)
    assert [record.message for record in caplog.records] == [
        "all weights are zero: draws are uniform until a norm is not"
    ]


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([0, 0, 1e30, 0, 0, 0, 0], id="one huge"),
        pytest.param([1e-45] * 7, id="smallest float32"),
        pytest.param([3.4e38, 1.0, 0, 1e-45, 1e20, 1e-20, 2], id="whole range of float32"),
        pytest.param([0, 0, 0, 0, 0, 0, 5], id="all but the last zero"),
        pytest.param([5, 0, 0, 0, 0, 0, 0], id="all but the first zero"),
    ],
)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_extreme_weights_never_leave_the_range(weights, exponent, chunk_size):
    sampler = sampler_of(np.float32(weights), chunk_size, smoothing=0.0, exponent=exponent, ess_fraction=0.2)
    ends = [0.0, 5e-324, 1e-300, 1e-16, 0.5, 1 - 1e-16, np.nextafter(1, 0)]
    for drawn in (
        sampler.draw(1000, np.random.default_rng(0)),
        sampler.draw(len(ends), Positions(ends), "independent"),
    ):
        assert drawn.indices.min() >= 0
        assert drawn.indices.max() < 7
        assert np.isfinite(drawn.coefficients).all()
        assert (drawn.probabilities > 0).all()
    assert (sampler.probabilities() > 0).all()
    assert abs(sampler.probabilities().sum() - 1) < 1e-12
    assert all(np.isfinite(list(sampler.stats(0).values())))


def test_largest_coefficient_is_bounded_at_every_draw():
    """Also between publications: the constant follows the weights at once."""
    rng = np.random.default_rng(6)
    sampler = ImportanceSampler(300, 64, Sampling(smoothing=0.0, max_coefficient=4.0, exponent=2.0))
    for version in range(20):
        chunk = int(rng.integers(5))
        sampler.update(chunk, rng.exponential(size=sampler.weights(chunk).size) * 10.0**version, version)
        coefficients = 1 / (300 * sampler.probabilities())
        assert coefficients.max() <= 4.0 * (1 + 1e-12)
        assert sampler.stats(version)["largest_coefficient"] == pytest.approx(coefficients.max(), rel=1e-9)


@pytest.mark.parametrize("wanted", [0.3, 0.9, 1.0])
def test_effective_sample_size_is_met_exactly_if_it_binds(wanted):
    sampler = sampler_of(np.random.default_rng(7).exponential(size=500) ** 3, 64, smoothing=0, ess_fraction=wanted)
    q = sampler.probabilities()
    assert 1 / (500 * (q * q).sum()) == pytest.approx(wanted, rel=1e-9)
    assert sampler.stats(0)["ess_fraction"] == pytest.approx(wanted, rel=1e-9)


def test_updates_between_two_draws_compute_the_proposal_once(monkeypatch):
    """An update is O(chunk), whatever the number of chunks."""
    sampler = sampler_of(np.arange(1.0, 1001.0), 10)
    rng = np.random.default_rng(0)
    sampler.draw(4, rng)
    computed = []
    propose = sampler_module.propose
    monkeypatch.setattr(sampler_module, "propose", lambda *given: computed.append(given) or propose(*given))
    for chunk in range(100):
        sampler.update(chunk, np.full(10, 2.0 + chunk), 1)
    assert not computed
    sampler.draw(4, rng)
    assert len(computed) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, 1e300])
def test_a_bad_norm_keeps_the_former_weight_and_is_logged(bad, caplog):
    sampler = sampler_of(np.arange(1.0, 201.0), 200, smoothing=0.0)
    before = sampler.weights(0)
    fresh = np.arange(1.0, 201.0) * 2
    fresh[50] = bad
    with caplog.at_level(logging.WARNING):
        assert sampler.update(0, fresh, 3) == 1
    assert "chunk 0 at version 3: 1 bad norms" in caplog.text
    ratio = sampler.weights(0) / before
    np.testing.assert_allclose(np.delete(ratio, 50), 2, rtol=1e-5)
    assert ratio[50] == pytest.approx(1, rel=1e-3)


def test_a_chunk_with_more_than_one_bad_norm_in_a_hundred_is_refused_whole():
    sampler = sampler_of(np.ones(200), 200)
    before = [array.copy() for array in sampler._arrays]
    fresh = np.full(200, 2.0)
    fresh[:3] = np.nan
    with pytest.raises(NonFiniteNormsError, match=r"chunk 0 at version 3: got 3 of 200"):
        sampler.update(0, fresh, 3)
    with pytest.raises(NonFiniteNormsError, match="200 of 200"):
        sampler.update(0, np.full(200, np.nan), 3)
    for array, former in zip(sampler._arrays, before, strict=True):
        np.testing.assert_array_equal(array, former)


@pytest.mark.parametrize(
    ("feedback_steps", "version", "kept"),
    [
        pytest.param([10], 5, True, id="newer feedback stays"),
        pytest.param([10], 10, False, id="scores as new replace it"),
        pytest.param([10], 15, False, id="newer scores replace it"),
        pytest.param([16], 16, True, id="feedback as new stays, on the edge of a unit of ages"),
        pytest.param([10, 20], 15, True, id="the example's latest feedback counts"),
        pytest.param([20, 10], 15, False, id="whatever comes last"),
        pytest.param([10, 5000], 4990, True, id="long after the scores"),
        pytest.param([10, 5000], 5000, True, id="where 5000 is a multiple of a unit"),
    ],
)
def test_feedback_against_scores(feedback_steps, version, kept):
    sampler = sampler_of(np.ones(40), 40, smoothing=0.0)
    for i, step in enumerate(feedback_steps):
        sampler.feedback([i, 9], [100.0, 100.0], step)
    sampler.update(0, np.full(40, 3.0), version)
    q = sampler.probabilities()
    assert q[9] / q[30] == pytest.approx(100 / 3 if kept else 1, rel=1e-4)
    assert q[1] / q[30] == pytest.approx(100 / 3 if len(feedback_steps) > 1 and kept else 1, rel=1e-4)
    assert q[0] / q[30] == pytest.approx(100 / 3 if feedback_steps[0] // 8 * 8 >= version else 1, rel=1e-4)


def test_every_example_of_one_feedback_stays():
    sampler = sampler_of(np.ones(40), 20, smoothing=0.0)
    sampler.feedback(np.arange(3, 31), np.full(28, 100.0), 10)
    sampler.update(0, np.ones(20), 5)
    sampler.update(1, np.ones(20), 5)
    q = sampler.probabilities()
    np.testing.assert_allclose(q[3:31] / q[0], 100, rtol=1e-2)
    np.testing.assert_allclose(q[31:] / q[0], 1, rtol=1e-12)


def test_feedback_ignores_bad_norms_and_counts_them(caplog):
    sampler = sampler_of(np.ones(4), 4, smoothing=0.0)
    assert sampler.feedback([0, 1, 2], [np.nan, 5.0, -1.0], 1) == 2
    assert sampler.feedback([3], [np.inf], 1) == 1
    np.testing.assert_allclose(sampler.probabilities(), np.array([1, 5, 1, 1]) / 8, rtol=1e-5)
    assert "2 of 3 norms" in caplog.text


def test_ema_decay_gives_the_root_mean_square_of_norms_seen():
    """w² ← m w² + (1 - m) ||g||², by scores and by feedback; the first norm counts whole."""
    m = 0.75
    sampler = sampler_of([3.0, 4.0, 0.0], 3, smoothing=0.0, ema_decay=m)
    np.testing.assert_allclose(sampler._weights.values, [3, 4, 0])
    sampler.update(0, [1.0, 4.0, 2.0], 1)
    np.testing.assert_allclose(sampler._weights.values, [np.sqrt(m * 9 + (1 - m)), 4, 1], rtol=1e-6)
    sampler.feedback([2], [7.0], 2)
    np.testing.assert_allclose(sampler._weights.values[2], np.sqrt(m + (1 - m) * 49), rtol=1e-6)
    other = ImportanceSampler(3, 3, Sampling(ema_decay=m))
    other.feedback([1], [5.0], 0)
    np.testing.assert_array_equal(other._weights.values, [np.nan, 5, np.nan])


@pytest.mark.parametrize("from_feedback", [False, True])
def test_the_older_a_weight_is_the_less_of_it_is_kept(from_feedback):
    """Of scores at step 0 and of norms fed back at step 40; a recent weight keeps ``ema_decay`` at most."""
    settings = Sampling(ema_decay=0.8, ema_steps=100.0)
    found = {}
    for age in (8, 160, 4000):
        sampler = ImportanceSampler(2, 2, settings)
        first = 40 if from_feedback else 0
        if from_feedback:
            sampler.feedback([0, 1], [3.0, 3.0], first)
        else:
            sampler.update(0, [3.0, 3.0], first)
        sampler.feedback([0], [1.0], first + age)
        by_feedback = float(sampler._weights.values[0])
        sampler.update(0, [1.0, 1.0], first + age + 8)
        np.testing.assert_allclose(sampler._weights.values[1], _kept(age + 8), rtol=1e-3)
        found[age] = by_feedback
    np.testing.assert_allclose(list(found.values()), [_kept(age) for age in found], rtol=1e-3)


def _kept(age: float) -> float:
    """A weight of 3 after a norm of 1."""
    share = min(0.8, np.exp(-age / 100.0))
    return np.sqrt(share * 9.0 + (1.0 - share))


def test_a_draw_can_be_spread_by_another_scheme_than_the_configured_one():
    sampler = sampler_of(np.ones(64), 16, scheme="stratified")
    apart = [len(set(sampler.draw(64, np.random.default_rng(s), "independent").indices)) for s in range(50)]
    assert {len(set(sampler.draw(64, np.random.default_rng(s)).indices)) for s in range(50)} == {64}
    assert max(apart) < 64
    assert len(set(sampler.draw_uniform(64, np.random.default_rng(0), "independent").indices)) < 64


def test_independent_draws_estimate_the_square_of_the_mean_without_bias():
    """Within four standard errors of μ²; stratified draws, whose pairs are not independent, are not."""
    rng = np.random.default_rng(6)
    g = np.sort(rng.normal(1.0, 3.0, size=400))  # strata differ
    sampler = sampler_of(np.abs(g), 100, smoothing=0.2)

    def estimates(kind):
        out = []
        for _ in range(1500):
            draw = sampler.draw(16, rng, kind)
            x = draw.coefficients * g[draw.indices]
            out.append(square_of_mean(abs(x.mean()), draw.coefficients, np.abs(g[draw.indices])))
        return np.mean(out), np.std(out) / np.sqrt(len(out))

    mean, error = estimates("independent")
    assert abs(mean - g.mean() ** 2) < 4 * error
    mean, error = estimates("stratified")
    assert abs(mean - g.mean() ** 2) > 4 * error


def test_fading_moves_only_at_refresh():
    sampler = sampler_of([1.0, 3.0], 1, smoothing=0.0, half_life_steps=10.0)
    fresh = sampler.probabilities()
    assert fresh[1] / fresh[0] == pytest.approx(3, rel=1e-5)
    sampler.refresh(10)
    half = sampler.probabilities()
    assert half[1] / half[0] == pytest.approx(2.5 / 1.5, rel=1e-5)
    sampler.refresh(10**6)
    np.testing.assert_allclose(sampler.probabilities(), 0.5)


def test_feedback_fades_by_its_own_age_however_old_its_chunk_is():
    """Example 1 was seen now, 2 a half-life ago; the others are known from scores of a hundred half-lives ago."""
    sampler = sampler_of([1.0, 1.0, 1.0, 5.0], 4, smoothing=0.0, half_life_steps=10.0)
    for step, index in ((990, 2), (1000, 1)):
        sampler.refresh(step)
        sampler.feedback([index], [9.0], step)
    mean = (1 + 9 + 9 + 5) / 4
    np.testing.assert_allclose(sampler.weights(0), [mean, 9, (9 + mean) / 2, mean], rtol=1e-4)


@pytest.mark.parametrize("half_life", [None, 3.0, 500.0])
@pytest.mark.parametrize("every", [5, 32, 100])
def test_a_round_of_scores_leaves_nothing_of_what_came_before(half_life, every):
    """As in a synchronous run, which resumes with the scores of its latest round and nothing else."""
    sampling = Sampling(ema_decay=0.0, half_life_steps=half_life)
    rng = np.random.default_rng(16)
    old = ImportanceSampler(173, 70, sampling)
    for start in range(0, 5 * every, every):
        resumed, norms = ImportanceSampler(173, 70, sampling), rng.exponential(size=173)
        for sampler in (old, resumed):
            fill(sampler, norms, start)
            sampler.refresh(start)
        for step in range(start, start + every):
            drawn = [sampler.draw(8, np.random.default_rng(step)) for sampler in (old, resumed)]
            for one, other in zip(*drawn, strict=True):
                np.testing.assert_array_equal(one, other)
            found = rng.exponential(size=8)
            for sampler in (old, resumed):
                sampler.feedback(drawn[0].indices, found, step)


def test_feedback_without_scores_fades_too():
    sampler = ImportanceSampler(3, 3, Sampling(smoothing=0.0, half_life_steps=10.0))
    sampler.refresh(100)
    sampler.feedback([0, 1], [2.0, 6.0], 105)
    sampler.refresh(110)
    # A unit of ages, an eighth of the half-life, is what rounding may cost; the first is exact.
    np.testing.assert_allclose(sampler.weights(0), [3.0, 5.0, 4.0], rtol=1e-5)


@pytest.mark.parametrize("settings", [{"max_coefficient": 3.0}, {"ess_fraction": 0.9}])
def test_bounds_hold_with_fading_and_feedback_of_all_ages(settings):
    rng = np.random.default_rng(15)
    sampler = ImportanceSampler(300, 64, Sampling(smoothing=0.0, half_life_steps=20.0, exponent=2.0, **settings))
    for step in range(0, 400, 4):
        sampler.refresh(step)
        if step % 40 == 0:
            sampler.update(
                step // 40 % 5, rng.exponential(size=sampler.weights(step // 40 % 5).size), max(0, step - 30)
            )
        drawn = sampler.draw(16, rng)
        sampler.feedback(drawn.indices, rng.exponential(size=16), step)
        q, stats = sampler.probabilities(), sampler.stats(step)
        largest = 1 / (300 * q.min())
        assert largest <= stats["largest_coefficient"] * (1 + 1e-9)
        assert stats["ess_fraction"] == pytest.approx(1 / (300 * (q * q).sum()), rel=1e-9)
        assert largest <= settings.get("max_coefficient", np.inf) * (1 + 1e-9)
        assert stats["ess_fraction"] >= settings.get("ess_fraction", 0.0) * (1 - 1e-9)


class TestDrop:
    """The paper's policy: unscored and stale chunks are left out, and the estimate is of the others only."""

    def test_it_is_labelled_biased_and_unbiased_for_the_usable(self):
        sampler = ImportanceSampler(30, 10, Sampling(max_age_steps=5, scheme="independent"))
        assert sampler.biased
        rng = np.random.default_rng(9)
        sampler.update(0, rng.exponential(size=10), 0)
        sampler.update(1, rng.exponential(size=10), 8)
        sampler.refresh(10)
        q = sampler.probabilities()
        assert (q[:10] == 0).all()
        assert (q[20:] == 0).all()
        assert (sampler.weights(0) == 0).all()
        drawn = sampler.draw(4000, rng)
        assert set(drawn.indices) == set(range(10, 20))
        np.testing.assert_allclose(drawn.coefficients, 1 / (10 * q[drawn.indices]), rtol=1e-12)

    def test_below_a_tenth_usable_it_is_uniform_sgd(self):
        sampler = ImportanceSampler(300, 10, Sampling(max_age_steps=5))
        sampler.update(0, np.arange(10.0), 0)
        np.testing.assert_allclose(sampler.probabilities(), 1 / 300)
        np.testing.assert_allclose(sampler.draw(9, np.random.default_rng(0)).coefficients, 1)

    def test_feedback_alone_does_not_make_a_chunk_usable(self):
        sampler = ImportanceSampler(20, 10, Sampling(max_age_steps=5))
        sampler.update(0, np.arange(10.0), 0)
        sampler.feedback([15], [3.0], 1)
        assert (sampler.probabilities()[10:] == 0).all()


@pytest.mark.parametrize(
    "settings", [{}, {"half_life_steps": 5.0}, {"max_age_steps": 50}, {"uniform": True}, {"ess_fraction": 0.9}]
)
@pytest.mark.parametrize("even", [False, True])
def test_a_chunk_that_is_left_out_is_drawn_no_more_and_the_others_stay_unbiased(settings, even):
    n, chunk_size = 50, 8
    sampler = ImportanceSampler(n, chunk_size, Sampling(**settings))
    rng = np.random.default_rng(0)
    for chunk in (0, 1, 2, 4, 6):  # two were never scored
        sampler.update(chunk, rng.gamma(1.0, size=sampler.weights(chunk).shape), 10)
    sampler.refresh(20)
    for chunk in (1, 5):
        sampler.leave_out(chunk)
    sampler.refresh(30)
    kept = ~np.isin(np.arange(n) // chunk_size, [1, 5])
    if even or settings.get("uniform"):
        q, draw = np.where(kept, 1 / kept.sum(), 0.0), sampler.draw_uniform(20_000, rng)
    else:
        q, draw = sampler.probabilities(), sampler.draw(20_000, rng)
    if "max_age_steps" in settings and not even:
        kept &= np.isin(np.arange(n) // chunk_size, [0, 2, 4, 6])
    assert (q[~kept] == 0).all()
    assert (q[kept] > 0).all()
    np.testing.assert_allclose(q.sum(), 1)
    assert kept[draw.indices].all()
    np.testing.assert_allclose(draw.probabilities, q[draw.indices], rtol=1e-12)
    np.testing.assert_allclose(draw.coefficients, 1 / (kept.sum() * q[draw.indices]), rtol=1e-12)
    for chunk in (0, 2, 3, 4):
        sampler.leave_out(chunk)
    with pytest.raises(EmptyDatasetError, match="all 7 chunks were left out"):
        sampler.leave_out(6)


def test_stats_against_brute_force():
    rng = np.random.default_rng(10)
    for exponent in (1.0, 2.0):
        sampler = ImportanceSampler(100, 30, Sampling(smoothing=0.2, exponent=exponent))
        w = rng.exponential(size=100).astype(np.float32)
        sampler.update(0, w[:30], 4)
        sampler.update(3, w[90:], 7)
        known = np.concatenate([w[:30], w[90:]]).astype(float)
        q = sampler.probabilities()
        got = sampler.stats(10)
        wanted = {
            "scored_fraction": 0.4,
            "ess_fraction": 1 / (100 * (q * q).sum()),
            "largest_coefficient": 1 / (100 * q.min()),
            "mean_age": (30 * 6 + 10 * 3) / 40,
            "max_age": 6.0,
            "mean_weight": known.mean(),
            "ideal_gain": len(known) * (known**2).sum() / known.sum() ** 2,
        }
        assert got == pytest.approx(wanted, rel=1e-9)
        assert all(type(value) is float for value in got.values())
    empty = ImportanceSampler(3, 2, Sampling()).stats(0)
    assert np.isnan([empty["mean_age"], empty["max_age"], empty["mean_weight"], empty["ideal_gain"]]).all()
    assert empty["scored_fraction"] == 0


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        pytest.param({"smoothing": 0.25}, 0.2, id="c over 1 + c"),
        pytest.param({"smoothing": 0.0, "max_coefficient": 4.0}, 0.25, id="one over the largest coefficient"),
        pytest.param({"smoothing": 0.0, "ess_fraction": 1.0}, 1.0, id="all of it"),
        pytest.param({"uniform": True}, 1.0, id="uniform"),
    ],
)
def test_share_of_the_proposal_that_is_uniform(settings, share):
    """The probability of an example whose weight is zero, times N."""
    weights = np.random.default_rng(14).exponential(size=100)
    weights[7] = 0.0
    sampler = sampler_of(weights, 30, **settings)
    assert sampler.uniform_share == pytest.approx(share, rel=1e-9)
    if not sampler.sampling.uniform:
        assert 100 * sampler.probabilities([7])[0] == pytest.approx(share, rel=1e-9)
    assert ImportanceSampler(3, 2, Sampling()).uniform_share == 1.0


def test_sums_do_not_drift():
    """After many updates and feedbacks, some 10^30 times larger than what stays: as if freshly built."""
    rng = np.random.default_rng(12)
    sampler = ImportanceSampler(200, 80, Sampling(smoothing=0.0, ema_decay=0.0))
    for step in range(300):
        scale = 1e30 if step % 2 else 1.0
        sampler.feedback(rng.integers(200, size=16), scale * rng.exponential(size=16), step)
        sampler.update(step % 3, scale * rng.exponential(size=sampler.weights(step % 3).size), step)
    w = rng.exponential(size=200)
    fill(sampler, w, 1000)
    s = w.astype(np.float32).astype(float)
    s += 1e-6 * s.mean()
    np.testing.assert_allclose(sampler.probabilities(), s / s.sum(), rtol=1e-12)


@pytest.mark.parametrize("chunk_size", [1024, 16_384, 1_000_000])
@pytest.mark.parametrize(("settings", "most"), [({}, 6), ({"half_life_steps": 500.0, "exponent": 2.0}, 7)])
def test_bytes_per_example(chunk_size, settings, most):
    sampler = ImportanceSampler(1_000_000, chunk_size, Sampling(**settings))
    sampler.draw(1, np.random.default_rng(0))
    assert sampler.nbytes <= most * 1_000_000 + 256 * sampler.n_chunks


def test_probabilities_of_some_are_those_of_all():
    sampler = sampler_of(np.random.default_rng(13).exponential(size=500), 130)
    indices = np.array([0, 499, 129, 130, 0, 391])
    np.testing.assert_array_equal(sampler.probabilities(indices), sampler.probabilities()[indices])
    drawn = sampler.draw(64, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.probabilities, sampler.probabilities(drawn.indices))


@pytest.mark.parametrize(
    ("mistake", "error", "match"),
    [
        (lambda: ImportanceSampler(0, 3, Sampling()), EmptyDatasetError, "got 0 examples"),
        (lambda: ImportanceSampler(3, 0, Sampling()), DataError, "chunk_size: got 0"),
        (lambda: sampler_of(np.ones(7), 3).update(3, [1.0], 0), DataError, "chunk: got 3, wanted 0 to 2"),
        (lambda: sampler_of(np.ones(7), 3).update(-1, [1.0], 0), DataError, "chunk: got -1"),
        (lambda: sampler_of(np.ones(7), 3).update(2, [1.0] * 3, 0), LengthMismatchError, r"\(3,\), wanted \(1,\)"),
        (lambda: sampler_of(np.ones(7), 3).feedback([7], [1.0], 0), DataError, r"in \[0, 7\)"),
        (lambda: sampler_of(np.ones(7), 3).feedback([1], [1.0, 2], 0), LengthMismatchError, "one norm per index"),
        (lambda: sampler_of(np.ones(7), 3).draw(0, np.random.default_rng()), DataError, "batch: got 0"),
    ],
)
def test_mistakes_are_named(mistake, error, match):
    with pytest.raises(error, match=match):
        mistake()


def test_all_is_known_once_all_chunks_are_scored_or_nearly_all_examples_were_fed_back():
    sampler = ImportanceSampler(100, 10, Sampling())
    sampler.feedback(range(89), np.ones(89), 5)
    assert not sampler.all_known()
    sampler.leave_out(9)
    assert sampler.all_known(since=100), "89 of 90; feedback has no versions"
    assert sampler.has_weight([0, 88, 89]).tolist() == [True, True, False]
    for chunk in range(9):
        sampler.update(chunk, np.ones(10), chunk)
        assert sampler.all_known() == (chunk == 8), "chunks that are not scored yet will be"
    assert not sampler.all_known(since=1)
