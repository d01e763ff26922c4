"""Positions on the unit interval, and the search that turns them into columns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from dask_isgd.sampling.draws import Edges, block_positions, positions, select_shared


@pytest.mark.parametrize("kind", ["stratified", "systematic"])
@pytest.mark.parametrize("batch", [1, 2, 7, 128])
def test_each_stratum_gets_exactly_one_position(kind, batch):
    for seed in range(20):
        at = positions(kind, batch, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.sort(np.floor(at * batch)), np.arange(batch))


def test_systematic_positions_share_one_offset():
    at = np.sort(positions("systematic", 16, np.random.default_rng(0)))
    np.testing.assert_allclose(np.diff(at), 1 / 16, rtol=1e-12)


@pytest.mark.parametrize("kind", ["independent", "stratified", "systematic"])
def test_every_slot_of_the_minibatch_is_uniform_on_its_own(kind):
    """So that any part of a minibatch is unbiased; seed fixed, fails for one seed in a thousand."""
    rng = np.random.default_rng(1)
    slots = np.array([positions(kind, 8, rng) for _ in range(4000)])
    for slot in (0, 3, 7):
        assert kstest(slots[:, slot], "uniform").pvalue > 1e-3
    strata = np.bincount((slots[:, 0] * 8).astype(int), minlength=8)
    assert chisquare(strata).pvalue > 1e-3


def test_the_minibatches_of_a_block_are_positioned_each_by_its_scheme_and_independently():
    """Seed fixed, fails for one seed in a thousand."""
    rng, schemes = np.random.default_rng(2), ["stratified", "independent", "systematic", "stratified"]
    blocks = np.array([block_positions(schemes, 8, rng) for _ in range(2000)])
    for row, scheme in enumerate(schemes):
        strata = np.sort(np.floor(blocks[:, row] * 8), axis=1)
        assert (strata == np.arange(8)).all() == (scheme != "independent")
        assert kstest(blocks[:, row, 5], "uniform").pvalue > 1e-3
    np.testing.assert_allclose(np.ptp(np.sort(blocks[:, 2], axis=1) - np.arange(8) / 8, axis=1), 0, atol=1e-12)
    slots = blocks[:, :, 3]
    assert np.abs(np.corrcoef(slots.T) - np.eye(4)).max() < 4 / 2000**0.5


@pytest.mark.parametrize(
    ("masses", "fraction", "column", "share", "inside"),
    [
        pytest.param([1, 1, 2], 0.0, 0, 0.25, 0.0, id="left edge"),
        pytest.param([1, 1, 2], 0.25, 1, 0.25, 0.0, id="an edge belongs to the right"),
        pytest.param([1, 1, 2], 0.75, 2, 0.5, 0.5, id="inside"),
        pytest.param([1, 1, 2], 1.0, 2, 0.5, 1.0, id="right edge"),
        pytest.param([0, 0, 3], 0.0, 2, 1.0, 0.0, id="leading zeros are skipped"),
        pytest.param([3, 0, 0], 1.0, 0, 1.0, 1.0, id="trailing zeros are skipped"),
        pytest.param([1, 0, 1], 0.5, 2, 0.5, 0.0, id="zeros between are skipped"),
        pytest.param([5e-324, 5e-324], 1.0, 1, 0.5, 0.0, id="the smallest positive numbers"),
    ],
)
def test_select(masses, fraction, column, share, inside):
    edges = np.cumsum(np.array([masses], np.float64), axis=1)
    row = Edges(edges.T, edges[:, -1])
    for got in (row.select(np.array([fraction])), select_shared(edges[0], np.array([fraction]))):
        assert got.columns.tolist() == [column]
        assert got.shares[0] == pytest.approx(share)
        assert got.fractions[0] == pytest.approx(inside)
    assert row.shares(np.array([column]))[0] == pytest.approx(share)


def test_columns_are_selected_with_their_shares_even_if_rounding_is_coarse():
    edges = np.repeat(np.cumsum([[1.0, 1e16, 1.0, 3.0]], axis=1), 1001, axis=0)
    rows = Edges(edges.T.copy(), edges[:, -1])
    selected = rows.select(np.linspace(0, 1, 1001))
    np.testing.assert_array_equal(selected.shares, rows.shares(selected.columns))
    every = [Edges(edges[:1].T, edges[:1, -1]).shares(np.array([column]))[0] for column in range(4)]
    np.testing.assert_array_equal(selected.shares, np.array(every)[selected.columns])
    assert sum(every) == pytest.approx(1, rel=1e-15)


def test_nothing_beyond_the_total_is_ever_selected():
    """Padding: a short row's edges continue beyond its total."""
    edges = np.array([[1.0, 2.5, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    rows = Edges(edges.T, np.array([2.0, 5.0]))
    for fraction in (0.0, 0.49, 0.5, 1.0):
        assert rows.select(np.full(2, fraction)).columns[0] == (fraction >= 0.5)
    assert rows.shares(np.array([0, 3])).tolist() == [0.5, 0.2]
    assert rows.shares(np.array([1, 0])).tolist() == [0.5, 0.4]
