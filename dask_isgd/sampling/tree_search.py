"""From a chunk to one of its examples: groups of blocks, blocks, examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Edges, Floats, Integers
from dask_isgd.sampling.proposal import Proposal
from dask_isgd.sampling.weight_blocks import WeightBlocks


class TreeSearch:
    """B searches at once, each in one chunk; ``edges`` of the level reached, then ``enter`` a column."""

    def __init__(self, proposal: Proposal, weights: WeightBlocks, chunks: Integers) -> None:
        self._weights, self._fill = weights, proposal.fill
        self._scale = None if proposal.plain else proposal.scale.take(chunks)
        self._shift: Floats = proposal.shift.take(chunks)
        self._length: Integers = weights.lengths.take(chunks)
        self._rows = chunks
        self._level = 0

    def edges(self) -> Edges:
        """The cumulated masses Σ s of what each search stands before."""
        steps = self._weights.steps[self._level]
        edges = np.cumsum(self._masses(), axis=1, dtype=np.float64)
        total = edges[:, -1].copy()
        if self._scale is not None:
            total *= self._scale
            edges *= self._scale[:, None]
        # As rounded below: where a row is full, its total is its last edge to the bit.
        total += self._shift * self._length
        edges += self._shift[:, None] * steps
        return Edges(edges, total)

    def enter(self, columns: Integers) -> None:
        """Go down, each search into its column."""
        unit, fan = self._weights.units[self._level], self._weights.fans[self._level]
        self._rows = self._rows * fan + columns
        self._length = np.minimum(self._length - columns * unit, unit)
        self._level += 1

    def _masses(self) -> NDArray[Any]:
        """(B, m) Σ u in each column, what is unscored counted as the mean."""
        w, rows = self._weights, self._rows
        if self._level == len(w.levels):
            return self._examples()
        sums, scored = w.levels[self._level]
        masses = sums.take(rows, axis=0)
        if w.unscored:
            unit = w.units[self._level]
            counts = np.clip(self._length[:, None] - np.arange(masses.shape[1]) * unit, 0, unit)
            masses += self._fill * (counts - scored.take(rows, axis=0))
        return masses

    def _examples(self) -> NDArray[Any]:
        w = self._weights
        masses = w.rows.take(self._rows, axis=0)
        # With all scored a NaN is padding, at the end of its block.
        if w.exponent == 1 and not w.unscored and not np.isnan(masses[:, -1]).any():
            return masses
        u = w.raised(masses.astype(np.float64))
        u[np.isnan(u)] = self._fill
        u[np.arange(w.block) >= self._length[:, None]] = 0.0
        return u
