"""Ticks of a logarithmic axis are round, distinct, few, and where the curve is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_isgd.display.ticks import log_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.025, 0.9, [0.03, 0.05, 0.1, 0.2, 0.3, 0.5]),
        (0.006, 1.8, [0.01, 0.03, 0.1, 0.3, 1.0]),
        (1.00, 1.05, [1.0, 1.01, 1.02, 1.03, 1.04, 1.05]),
        (1e-12, 1e6, [1e-12, 1e-8, 1e-4, 1.0, 1e4]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_ticks(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


@given(st.floats(-12, 9), st.floats(0.01, 18))
def test_two_at_least_and_none_twice(exponent, span):
    low, high = 10**exponent, 10 ** (exponent + span)
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) == len(set(ticks)) <= 8
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert ticks == sorted(ticks)
