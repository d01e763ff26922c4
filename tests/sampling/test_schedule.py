"""The choice of the chunks to score next."""

from __future__ import annotations

import numpy as np
import pytest

from dask_isgd.sampling import next_chunks
from dask_isgd.sampling.schedule import probe_version

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


def test_every_chunk_gets_its_turn():
    versions, seen = np.full(10, np.nan), []
    for step in range(20):
        (chunk,) = next_chunks(versions, [], 1)
        versions[chunk] = step
        seen.append(chunk)
    assert seen == [*range(10), *range(10)]


@pytest.mark.parametrize(
    ("versions", "wanted"),
    [
        pytest.param([], np.inf, id="no chunks"),
        pytest.param([NAN, NAN], np.inf, id="nothing scored"),
        pytest.param([4], 4, id="one"),
        pytest.param([3, 1, NAN, 2], 3, id="at least one"),
        pytest.param(range(40), 38, id="a twentieth"),
        pytest.param([*[NAN] * 39, 7], 7, id="fewer scored than a twentieth"),
        pytest.param([5] * 40, 5, id="ties count all"),
    ],
)
def test_the_probe_is_the_twentieth_scored_last(versions, wanted):
    assert probe_version(list(versions)) == wanted
