"""Which runs claim a share of the scorers: pure, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_isgd.coordinator.fair_share import Claims, part


@given(room=st.integers(0, 100), runs=st.sets(st.text("abc", min_size=1, max_size=3), min_size=1))
def test_the_parts_are_equal_and_fill_the_room(room, runs):
    parts = [part(room, run, runs) for run in runs]
    assert max(parts) - min(parts) <= 1
    assert sum(parts) == (room if room >= len(runs) else len(runs) * min(room, 1))


@pytest.mark.parametrize(
    ("claims", "now", "runs"),
    [
        ([], 0.0, ""),
        ([("a", 0.0)], 4.9, "a"),
        ([("a", 0.0)], 5.0, ""),
        ([("a", 0.0), ("b", 3.0)], 5.5, "b"),
        ([("a", 0.0), ("b", 3.0), ("a", 4.0)], 7.9, "ab"),  # a claim that is repeated
    ],
)
def test_a_claim_expires(claims, now, runs):
    received = Claims()
    for run, at in claims:
        received.add(run, at)
    assert received.runs(now) == set(runs)
