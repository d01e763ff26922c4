"""Which chunks are scored next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_isgd.sampling import next_chunks, restless_chunks

NAN = float("nan")


@pytest.mark.parametrize(
    ("versions", "in_flight", "k", "chosen"),
    [
        pytest.param([3, 1, 2], [], 2, [1, 2], id="oldest first"),
        pytest.param([3, NAN, 2, NAN], [], 3, [1, 3, 2], id="never scored before all"),
        pytest.param([5, 5, 5], [], 2, [0, 1], id="ties by index"),
        pytest.param([3, 1, 2], [1], 2, [2, 0], id="in flight left out"),
        pytest.param([3, 1, 2], {0, 1, 2}, 2, [], id="all in flight"),
        pytest.param([3, 1], [], 9, [1, 0], id="fewer than asked for"),
        pytest.param([3, 1], [], 0, [], id="none asked for"),
        pytest.param([3, 1], [], -4, [], id="more in flight than allowed"),
        pytest.param([], [], 4, [], id="no chunks"),
    ],
)
def test_next_chunks(versions, in_flight, k, chosen):
    before = np.array(versions)
    got = next_chunks(before, in_flight, k)
    assert got == chosen
    assert all(type(chunk) is int for chunk in got)
    np.testing.assert_array_equal(before, versions)
    alike = np.ones(len(versions))
    assert restless_chunks(before, 9, alike, alike, in_flight, k) == chosen, "round robin where chunks are alike"
    unknown = np.full(len(versions), NAN)
    assert restless_chunks(before, 9, unknown, unknown, in_flight, k) == chosen


def restless_alike(versions, in_flight, k, among):
    return restless_chunks(versions, 9, np.ones(len(versions)), np.ones(len(versions)), in_flight, k, among)


@pytest.mark.parametrize("choose", [next_chunks, restless_alike])
def test_only_among_the_given(choose):
    assert choose([4.0, 1.0, 3.0, 2.0], [3], 4, [2, 3, 0]) == [2, 0]
    assert choose([4.0, 1.0], [], 4, []) == []


@pytest.mark.parametrize(
    ("weights", "volatility", "chosen"),
    [
        pytest.param([1, 1, 1], [1, 1, 1], [0, 1, 2], id="alike: by age"),
        pytest.param([1, 1, 1], [1, 9, 1], [1, 0, 2], id="the restless sooner"),
        pytest.param([1, 1, 9], [1, 1, 1], [2, 0, 1], id="the heavy sooner"),
        pytest.param([1, 1, 9], [1, 1, 0], [0, 1, 2], id="heavy but still: later"),
        pytest.param([1, 1, NAN], [1, 1, 1], [0, 1, 2], id="the unknown count as the mean"),
    ],
)
def test_restless_chunks(weights, volatility, chosen):
    assert restless_chunks([2, 3, 4], 10, weights, volatility, [], 3) == chosen


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 40),
    slots=st.integers(1, 5),
    seed=st.integers(0, 999),
    moving=st.booleans(),
)
def test_no_chunk_waits_more_than_ten_sweeps(n, slots, seed, moving):
    """Whatever weights and volatilities do; see ``restless_chunks`` for why there is a bound."""
    rng = np.random.default_rng(seed)
    versions, last = np.full(n, NAN), np.zeros(n)
    weights, volatility = rng.exponential(size=(2, n)) ** 6
    for step in range(30 * n):
        if moving:
            weights, volatility = rng.exponential(size=(2, n)) ** 6
        chosen = restless_chunks(versions, step, weights, volatility, [], slots)
        versions[chosen] = last[chosen] = step
        assert (step - last).max() <= 10 * n / slots + 10


def test_every_chunk_gets_its_turn():
    versions, seen = np.full(10, np.nan), []
    for step in range(20):
        (chunk,) = next_chunks(versions, [], 1)
        versions[chunk] = step
        seen.append(chunk)
    assert seen == [*range(10), *range(10)]
