"""Where the draws of one minibatch fall on the unit interval, and what a minibatch is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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
    minibatch estimate another mean than the second, so the strata are shuffled. Halves of a stratified
    minibatch are then unbiased each, but not independent of one another: no two share a stratum.
    """
    if batch < 1:
        raise DataError(f"batch: got {batch}, wanted at least 1; ask for one example or more")
    if kind == "independent":
        return rng.random(batch)
    offsets = rng.random(batch) if kind == "stratified" else rng.random()
    strata = rng.permutation(batch)
    # (b + 1 - tiny)/b may round to 1.0 exactly.
    return np.minimum((strata + offsets) / batch, np.nextafter(1.0, 0.0))


def uniform(n: int, kind: str, batch: int, rng: np.random.Generator) -> Draw:
    """A minibatch drawn uniformly from ``n`` examples: coefficients 1, probabilities 1/n."""
    indices = np.minimum((positions(kind, batch, rng) * n).astype(np.int64), n - 1)
    return Draw(indices, np.ones(batch), np.full(batch, 1.0 / n))


def pick(masses: Floats, fractions: Floats) -> tuple[Integers, Floats, Floats]:
    """In each row, the column in which a fraction of the row's total falls.

    ``masses`` (B, m) not negative, with a positive total in every row; ``fractions`` (B,) in [0, 1].
    Returns the columns (B,), the share of the total each was picked with (B,), and where
    inside the column the fraction fell (B,) in [0, 1], to go one level deeper.
    """
    edges = np.cumsum(masses, axis=1)
    return pick_edges(edges, fractions, (edges <= _inside(edges[:, -1], fractions)[:, None]).sum(axis=1))


def pick_shared(edges: Floats, fractions: Floats) -> tuple[Integers, Floats, Floats]:
    """As ``pick``, for one row (m,) of cumulated masses shared by every fraction."""
    columns = np.searchsorted(edges, _inside(edges[-1:], fractions), side="right")
    return pick_edges(edges[None], fractions, columns)


def shares(masses: Floats) -> Floats:
    """(B, m) shares that ``pick`` picks with: of the very edges it searches, rounding included."""
    edges = np.cumsum(masses, axis=-1)
    return np.asarray(np.diff(edges, axis=-1, prepend=0.0) / edges[..., -1:])


def pick_edges(edges: Floats, fractions: Floats, columns: Integers) -> tuple[Integers, Floats, Floats]:
    rows = np.arange(len(edges)) if len(edges) > 1 else np.zeros(1, np.int64)
    total = edges[:, -1]
    low = np.where(columns > 0, edges[rows, columns - 1], 0.0)
    width = edges[rows, columns] - low
    inside = np.clip((_inside(total, fractions) - low) / width, 0.0, 1.0)
    return columns, width / total, inside


def _inside(total: Floats, fractions: Floats) -> Floats:
    # Strictly below the total: a search for the total itself would return an index past the end.
    return np.asarray(np.minimum(fractions * total, np.nextafter(total, 0.0)))
