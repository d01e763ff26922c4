"""From a chunk down to one of its examples: through groups of blocks, blocks and their parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Edges, Floats, Integers
from dask_isgd.sampling.proposal import Proposal
from dask_isgd.sampling.sum_tree import row_sums
from dask_isgd.sampling.weight_blocks import WeightBlocks


class TreeSearch:
    """B simultaneous searches, each in one chunk: ``edges`` of the current level, then ``descend`` into a column."""

    def __init__(self, proposal: Proposal, weights: WeightBlocks, chunks: Integers) -> None:
        self._weights, self._prior = weights, proposal.prior
        self._scale = None if proposal.unscaled else proposal.scale.take(chunks)
        self._shift: Floats = proposal.shift.take(chunks)
        self._length: Integers = weights.lengths.take(chunks)
        self._rows = chunks
        self._level = 0

    def edges(self) -> Edges:
        """Return the cumulative masses Σ s of the columns that each search can descend into."""
        extents = self._weights.extents[self._level]
        edges = _cumulative(self._masses())
        total = edges[-1].copy()
        if self._scale is not None:
            total *= self._scale
            edges *= self._scale
        # Rounded as below: if a row is full, its total is its last edge to the bit.
        total += self._shift * self._length
        edges += extents[:, None] * self._shift
        return Edges(edges, total)

    def descend(self, columns: Integers) -> None:
        """Move each search one level down, into its column (B,)."""
        unit, fanout = self._weights.units[self._level], self._weights.fanouts[self._level]
        self._rows = self._rows * fanout + columns
        self._length = np.minimum(self._length - columns * unit, unit)
        self._level += 1

    def _masses(self) -> NDArray[Any]:
        """(B, m) Σ (r u + (1 - r) mean) in each column; of unscored examples r is zero."""
        w, rows = self._weights, self._rows
        if self._level == len(w.fanouts) - 1:
            return self._examples(w.part)
        if self._level == len(w.levels):
            parts = self._examples(w.block).reshape(-1, w.part).astype(np.float64)
            return row_sums(parts).reshape(len(rows), -1)
        sums, fresh = w.levels[self._level]
        masses = sums.take(rows, axis=0)
        if w.unscored or w.faded:
            unit = w.units[self._level]
            counts = np.clip(self._length[:, None] - np.arange(masses.shape[1]) * unit, 0, unit)
            masses += self._prior * (counts - fresh.take(rows, axis=0))
        return masses

    def _examples(self, width: int) -> NDArray[Any]:
        """(B, ``width``) the masses of all examples in each block, or part of one."""
        w = self._weights
        masses = w.values.reshape(-1, width).take(self._rows, axis=0)
        # If all are scored, a NaN is padding, at the end of its block.
        if w.exponent == 1 and not w.unscored and not w.faded and not np.isnan(masses[:, -1]).any():
            return masses
        u = w.to_power(masses.astype(np.float64))
        if w.faded:
            r = w.freshness(self._rows, width)
            u = r * u + (1.0 - r) * self._prior
        u[np.isnan(u)] = self._prior
        u[np.arange(width) >= self._length[:, None]] = 0.0
        return u


def _cumulative(masses: NDArray[Any]) -> Floats:
    """Return (m, B) the cumulative sums of each row of (B, m)."""
    edges = np.empty(masses.shape[::-1])
    edges[0] = masses[:, 0]
    for column in range(1, len(edges)):
        np.add(edges[column - 1], masses[:, column], out=edges[column])
    return edges
