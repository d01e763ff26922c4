"""The ages of examples in one byte each, against their exact steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_isgd.sampling.example_ages import CODES_PER_HALF_LIFE, FRESHNESS, ExampleAges

LENGTH, CHUNKS = 6, 2
OPERATION = st.tuples(
    st.integers(0, CHUNKS - 1),
    st.integers(1, 40) | st.integers(1000, 9000),  # steps that pass
    st.none() | st.integers(0, 500),  # a rescoring with this lag, or else feedback
    st.sets(st.integers(0, LENGTH - 1), min_size=1),
)


def dated(ages, chunk):
    """(LENGTH,) the step that each weight of a chunk is said to date from."""
    return ages.base[chunk] + ages.unit * ages.codes[chunk * LENGTH : (chunk + 1) * LENGTH]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(half_life=st.sampled_from([None, 3.0, 80.0, 500.0, 1e5]), operations=st.lists(OPERATION, max_size=40))
def test_no_weight_is_said_to_be_newer_than_it_is_and_none_much_older(half_life, operations):
    ages = ExampleAges(np.zeros(CHUNKS * LENGTH, np.uint8), CHUNKS, LENGTH, half_life)
    exact, rounded = np.full((CHUNKS, LENGTH), np.nan), np.zeros((CHUNKS, LENGTH))
    step = 0
    for chunk, passed, lag, examples in operations:
        step += passed
        inside = np.array(sorted(examples))
        if lag is None:
            ages.mark(np.full(len(inside), chunk), chunk * LENGTH + inside, step)
            exact[chunk, inside], rounded[chunk, inside] = step, 1
        else:
            version = max(0, step - lag)
            base = ages.base[chunk]
            kept = ages.rescore(chunk, version, LENGTH)
            known = np.nan_to_num(exact[chunk], nan=-1.0)
            assert not kept[known < version].any(), "what is older is replaced"
            newer = known - ages.unit * (rounded[chunk] + 1) >= np.fmax(version, base)
            young = known > known.max() - 100 * ages.unit
            fed_back = rounded[chunk] > 0
            assert not kept[~fed_back].any()
            assert kept[fed_back & newer & young].all(), "what is newer by more than the rounding is kept"
            exact[chunk, ~kept], rounded[chunk, ~kept] = version, 0
            rounded[chunk, kept] += 1
        for k in range(CHUNKS):
            known = ~np.isnan(exact[k])
            late = dated(ages, k)[known] - exact[k][known]
            newest = exact[k][known].max(initial=-np.inf)
            moved = exact[k][known] < newest - 120 * ages.unit
            assert (late[~moved] <= 1e-3 * ages.unit).all()
            assert (late[~moved] >= -ages.unit * (rounded[k][known][~moved] + 1)).all()
            assert (dated(ages, k)[known][moved] <= newest - 100 * ages.unit).all(), "16 half-lives, but for rounding"


def test_a_unit_is_an_eighth_of_the_half_life():
    ages = ExampleAges(np.zeros(4, np.uint8), 1, 4, 400.0)
    ages.rescore(0, 0, 4)
    ages.mark(np.zeros(2, int), np.array([1, 2]), 400)
    np.testing.assert_array_equal(ages.codes, [0, 8, 8, 0])
    assert FRESHNESS[CODES_PER_HALF_LIFE] == 2.0
    assert FRESHNESS[0] == 1.0


@pytest.mark.parametrize("version", [0, 200])
def test_a_base_that_moves_is_reported(version):
    ages = ExampleAges(np.zeros(8, np.uint8), 2, 4, 80.0)
    for chunk in (0, 1):
        ages.rescore(chunk, version, 4)
    assert ages.mark(np.array([1]), np.array([4]), version + 1000) == []
    assert ages.mark(np.array([0, 1]), np.array([3, 5]), version + 2560) == [0, 1]
    np.testing.assert_array_equal(ages.codes, [0, 0, 0, 128, 0, 128, 0, 0])
    np.testing.assert_array_equal(ages.base, np.full(2, version + 1280.0))
