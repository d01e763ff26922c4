"""Where the draws of one minibatch fall on the unit interval, and the search that turns them into examples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_BELOW_ONE = float(np.nextafter(1.0, 0.0))


class Draw(NamedTuple):
    """A minibatch of B indices and what makes it unbiased."""

    indices: Integers
    """(B,) int64, in [0, N), in random order; repeats are possible."""
    coefficients: Floats
    """(B,) float64, 1/(N q): the mean over the minibatch of coefficient × gradient estimates the mean gradient."""
    probabilities: Floats
    """(B,) float64, q in force at the draw."""


def positions(kind: str, batch: int, rng: np.random.Generator) -> Floats:
    """(batch,) positions in [0, 1), each uniform on its own, in an order independent of their values.

    ``"independent"``: as they come. ``"stratified"``: one in each of ``batch`` equal strata.
    ``"systematic"``: one offset for all strata. Sorted positions would make the first half of a
    minibatch estimate another mean than the second, so the strata are shuffled. Parts of one stratified
    minibatch are then unbiased each, but not independent of one another: no two share a stratum.
    """
    if batch < 1:
        raise DataError(f"batch: got {batch}, wanted at least 1; ask for one example or more")
    if kind == "independent":
        return rng.random(batch)
    offsets = rng.random(batch) if kind == "stratified" else rng.random()
    # (b + 1 - tiny)/b may round to 1.0 exactly.
    return np.minimum((rng.permutation(batch) + offsets) / batch, _BELOW_ONE)


def uniform(n: int, kind: str, batch: int, rng: np.random.Generator) -> Draw:
    """A minibatch drawn uniformly from ``n`` examples: coefficients 1, probabilities 1/n."""
    indices = np.minimum((positions(kind, batch, rng) * n).astype(np.int64), n - 1)
    return Draw(indices, np.ones(batch), np.full(batch, 1.0 / n))


class Picked(NamedTuple):
    """In each of B rows, one column."""

    columns: Integers
    """(B,)"""
    shares: Floats
    """(B,) of the row's total: the probability of the column."""
    inside: Floats
    """(B,) in [0, 1): where in the column the position fell, to go one level deeper."""


def pick_shared(edges: Floats, fractions: Floats) -> Picked:
    """The columns of one row (m,) of cumulated masses, shared by every fraction (B,) in [0, 1)."""
    total = edges[-1:]
    target = _target(total, fractions)
    columns = np.searchsorted(edges, target, side="right")
    low = np.where(columns > 0, edges.take(columns - 1), 0.0)
    width = edges.take(columns) - low
    return Picked(columns, width / total, _inside(target, low, width))


class Edges:
    """The cumulated masses of B rows, cut off at each row's total.

    ``edges`` (B, m) never falling along a row, ``total`` (B,) positive and equal to an edge: the first to
    reach it is the last column that can be picked, whatever lies behind (padding).
    """

    def __init__(self, edges: Floats, total: Floats) -> None:
        self.edges, self.total = edges, total
        self._starts = np.arange(0, edges.size, edges.shape[1])

    def pick(self, fractions: Floats) -> Picked:
        """In each row the column in which a fraction (B,) in [0, 1) of the total falls."""
        target = _target(self.total, fractions)
        # The first column that is not passed; numpy's argmin stops there.
        columns = (self.edges <= target[:, None]).argmin(axis=1)
        low, width = self._of(columns)
        return Picked(columns, width / self.total, _inside(target, low, width))

    def shares(self, columns: Integers) -> Floats:
        """(B,) what ``pick`` picks the columns with."""
        return np.asarray(self._of(columns)[1] / self.total)

    def _of(self, columns: Integers) -> tuple[Floats, Floats]:
        at = self._starts + columns
        low = np.where(columns > 0, self.edges.take(at - 1), 0.0)
        return low, np.minimum(self.edges.take(at), self.total) - low


def _target(total: Floats, fractions: Floats) -> Floats:
    # Strictly below the total: a search for the total itself would return an index past the end.
    return np.asarray(np.minimum(fractions * total, np.nextafter(total, 0.0)))


def _inside(target: Floats, low: Floats, width: Floats) -> Floats:
    return np.asarray((target - low) / width)
