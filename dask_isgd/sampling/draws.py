"""The positions of a minibatch's draws on the unit interval, and the search that turns them into examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_BELOW_ONE = float(np.nextafter(1.0, 0.0))


class Draw(NamedTuple):
    """A minibatch of B indices, with the coefficients that make it unbiased."""

    indices: Integers
    """(B,) int64, in [0, N), in random order; repeats are possible."""
    coefficients: Floats
    """(B,) float64, 1/(N q): the mean over the minibatch of coefficient × gradient estimates the mean gradient."""
    probabilities: Floats
    """(B,) float64, q in force at the draw."""

    def split(self, size: int) -> list[Draw]:
        """Return its minibatches of ``size`` examples each."""
        rows = [slice(k, k + size) for k in range(0, len(self.indices), size)]
        return [Draw(self.indices[r], self.coefficients[r], self.probabilities[r]) for r in rows]


def positions(scheme: str, batch: int, rng: np.random.Generator) -> Floats:
    """Return (batch,) positions in [0, 1), each uniform on its own, in an order independent of their values.

    ``"independent"``: no relation between them. ``"stratified"``: one in each of ``batch`` equal strata.
    ``"systematic"``: the same, with one offset for all strata. If positions were sorted, the first half of a
    minibatch would estimate another mean than the second, so the strata are shuffled. Each part of a stratified
    minibatch is then unbiased, but parts are not independent of one another: no two share a stratum.
    """
    if batch < 1:
        raise DataError(f"batch: got {batch}, wanted at least 1; ask for one example or more")
    if scheme == "independent":
        return rng.random(batch)
    return _in_strata(rng.permutation(batch), rng.random(batch) if scheme == "stratified" else rng.random())


def block_positions(schemes: Sequence[str], batch: int, rng: np.random.Generator) -> Floats:
    """Return (len(schemes), batch) positions, each row as ``positions`` does by its scheme, independent of the others.

    A block of minibatches at once costs hardly more than one of them.
    """
    offsets = rng.random((len(schemes), batch))
    strata = rng.permuted(np.tile(np.arange(batch), (len(schemes), 1)), axis=1)
    shared = [scheme == "systematic" for scheme in schemes]
    at = _in_strata(strata, np.where(np.array(shared)[:, None], offsets[:, :1], offsets))
    independent = [scheme == "independent" for scheme in schemes]
    at[independent] = offsets[independent]
    return at


def _in_strata(strata: Integers, offsets: Floats | float) -> Floats:
    # (b + 1 - tiny)/b may round to 1.0 exactly.
    return np.asarray(np.minimum((strata + offsets) / strata.shape[-1], _BELOW_ONE))


def uniform(n: int, at: Floats) -> Draw:
    """Return the examples at positions (B,) in [0, 1), each of ``n`` equally probable: coefficients 1."""
    indices = np.minimum((at * n).astype(np.int64), n - 1)
    return Draw(indices, np.ones(len(at)), np.full(len(at), 1.0 / n))


class Selection(NamedTuple):
    """One selected column in each of B rows."""

    columns: Integers
    """(B,)"""
    shares: Floats
    """(B,) share of the row's total: the probability of the column."""
    fractions: Floats
    """(B,) in [0, 1): where in the column the position fell, for the search one level down."""


def select_shared(edges: Floats, fractions: Floats) -> Selection:
    """Select columns of a single row (m,) of cumulative masses, shared by all ``fractions`` (B,) in [0, 1)."""
    total = edges[-1:]
    target = _target(total, fractions)
    columns = np.searchsorted(edges, target, side="right")
    low = np.where(columns > 0, edges.take(columns - 1), 0.0)
    width = edges.take(columns) - low
    return Selection(columns, width / total, _fraction(target, low, width))


class Edges:
    """The cumulative masses of B searches in m columns, cut off at each search's total.

    ``edges`` (m, B) never decrease along the columns. ``total`` (B,) is positive and equal to an edge: the first column
    to reach it is the last that can be selected, whatever follows (padding). The columns come first, because numpy
    is several times as fast along B as along a few columns.
    """

    def __init__(self, edges: Floats, total: Floats) -> None:
        self.edges, self.total = edges, total
        self._searches = np.arange(len(total))

    def select(self, fractions: Floats) -> Selection:
        """Select in each search the column that contains the given fraction (B,), in [0, 1), of the total."""
        target = _target(self.total, fractions)
        columns = np.add.reduce(self.edges <= target, axis=0, dtype=np.int64)
        low, width = self._interval(columns)
        return Selection(columns, width / self.total, _fraction(target, low, width))

    def shares(self, columns: Integers) -> Floats:
        """Return (B,) the probabilities with which ``select`` selects the columns (B,)."""
        return np.asarray(self._interval(columns)[1] / self.total)

    def _interval(self, columns: Integers) -> tuple[Floats, Floats]:
        at = self._searches + columns * len(self.total)
        low = np.where(columns > 0, self.edges.take(at - len(self.total)), 0.0)
        return low, np.minimum(self.edges.take(at), self.total) - low


def _target(total: Floats, fractions: Floats) -> Floats:
    # Strictly below the total: a search for the total itself would return an index past the end.
    return np.asarray(np.minimum(fractions * total, np.nextafter(total, 0.0)))


def _fraction(target: Floats, low: Floats, width: Floats) -> Floats:
    return np.asarray((target - low) / width)
