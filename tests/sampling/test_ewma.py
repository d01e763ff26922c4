"""Exponential averages and their uncertainty against explicit weights of every observation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from dask_isgd.sampling.ewma import EWMA, student_quantile

NAMES = ("a", "b", "c")


def observed(decay, observations):
    average = EWMA(NAMES, decay)
    for values in observations:
        assert average.add(values)
    return average


def weights(decay, n):
    """(n,) weight of each observation after all n of them."""
    return (1 - decay) * decay ** np.arange(n - 1, -1, -1.0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_means_are_those_of_the_explicit_weights(decay, n):
    x = np.random.default_rng(n).normal(3, 1, size=(n, 3))
    average = observed(decay, x)
    v = weights(decay, n)
    wanted = (v[:, None] * x).sum(0) / v.sum()
    assert average
    np.testing.assert_allclose([average[name] for name in NAMES], wanted, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("n", [6, 40])
@pytest.mark.parametrize("gradient", [{"a": 1.0}, {"b": -2.0, "c": 0.5}, {"a": 1.0, "b": 1.0, "c": 1.0}], ids=str)
def test_half_widths_are_those_of_the_explicit_covariance(decay, n, gradient):
    x = np.random.default_rng(n).normal(size=(n, 3)) @ np.array([[1, 0.9, 0], [0, 1, 0], [0, -3, 2.0]])
    average = observed(decay, x)
    v = weights(decay, n)
    mean = (v[:, None] * x).sum(0) / v.sum()
    covariance = np.einsum("n,ni,nj->ij", v**2, x - mean, x - mean) / v.sum() ** 2
    count = v.sum() ** 2 / (v**2).sum()
    slope = np.array([gradient.get(name, 0.0) for name in NAMES])
    error = math.sqrt(slope @ covariance @ slope / (1 - 1 / count))
    assert average.half_width(gradient) == pytest.approx(student_quantile(count - 1) * error, rel=1e-9)


def test_equal_weights_give_the_classical_interval_of_the_mean():
    """With a decay close to one: the sample's standard deviation over the root of n, times Student's quantile."""
    x = np.random.default_rng(1).normal(size=30)
    average = observed(1 - 1e-9, np.column_stack([x, x, x]))
    wanted = student.ppf(0.975, 29) * x.std(ddof=1) / math.sqrt(30)
    assert average.half_width({"a": 1.0}) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("decay", [0.8, 0.95])
def test_intervals_contain_the_truth_in_95_of_100_cases(decay):
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(1000):
        average = observed(decay, rng.normal(size=(60, 3)))
        inside += abs(average["a"]) <= average.half_width({"a": 1.0})
    assert 0.93 <= inside / 1000 <= 0.97


@pytest.mark.parametrize("freedom", [3, 5, 9, 19, 100])
def test_student_quantile(freedom):
    assert student_quantile(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=0.01)


def test_nothing_is_known_before_the_first_observation_and_no_width_before_the_second():
    average = EWMA(NAMES, 0.9)
    assert not average
    assert math.isnan(average.half_width({"a": 1.0}))
    average.add([1.0, 2.0, 3.0])
    assert average["b"] == pytest.approx(2.0)
    assert math.isnan(average.half_width({"a": 1.0}))
    average.add([1.0, 2.0, 3.0])
    assert average.half_width({"a": 1.0}) == pytest.approx(0.0, abs=1e-6)


def test_a_decay_of_zero_keeps_the_last_observation_only():
    average = observed(0.0, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert [average[name] for name in NAMES] == [4.0, 5.0, 6.0]
    assert math.isnan(average.half_width({"a": 1.0}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_observation_that_is_not_finite_is_ignored(bad):
    average = observed(0.9, [[1.0, 2.0, 3.0]])
    before = average.state()
    assert not average.add([4.0, bad, 6.0])
    assert average.state() == before


def test_state_and_restore_continue_bit_for_bit():
    x = np.random.default_rng(3).normal(size=(20, 3))
    first, second = observed(0.9, x[:10]), EWMA(NAMES, 0.9)
    second.restore(first.state())
    assert all(type(value) is float for value in first.state())
    for values in x[10:]:
        first.add(values)
        second.add(values)
    assert first.state() == second.state()
    assert first.half_width({"a": 1.0}) == second.half_width({"a": 1.0})
