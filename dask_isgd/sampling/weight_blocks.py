"""Stored weights with their sums: per block of a chunk, per group of blocks, and per chunk."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Floats, Integers
from dask_isgd.sampling.example_ages import FRESHNESS
from dask_isgd.sampling.sum_tree import SumTree, row_maxima, row_minima, row_sums

LARGEST, SMALLEST = 1e36, 1e-36
"""Larger weights count as LARGEST, smaller ones as zero: squares of fourth powers, times N, still fit float64."""
MAX_BLOCK = 64
"""Examples per block: larger blocks take longer to search, sums of smaller ones would outweigh the weights."""
_PART = 8
"""Examples per part of a block: sums of parts are made by the search, which takes half the time of one of 64."""


class WeightBlocks:
    """N float32 weights, NaN if never scored; each chunk is a square of blocks of at most 64 examples.

    Sums are of u, the weight raised to ``exponent``, in float64. If weights are ``faded``, there are sums of r u and r
    besides, with r the freshness of ``example_ages``; otherwise every r is one. The squares, minima and maxima that
    only reports and some policies need are recomputed on demand, from the blocks changed since.

    Letters: K chunks of G groups of F blocks of L examples. A chunk's last blocks may be padded with NaN.
    """

    def __init__(self, n: int, chunk_size: int, exponent: float, *, faded: bool = False) -> None:
        self.n, self.chunk_size, self.exponent, self.faded = n, chunk_size, exponent, faded
        blocks = -(-chunk_size // MAX_BLOCK)
        self.f = max(1, round(math.sqrt(blocks)))
        self.g = -(-blocks // self.f)
        self.block = -(-chunk_size // (self.g * self.f))
        self.part = self.block if self.block <= 2 * _PART else _PART
        self.block = -(-self.block // self.part) * self.part
        k = -(-n // chunk_size)
        self.lengths: Integers = np.minimum(chunk_size, n - chunk_size * np.arange(k, dtype=np.int64))
        last = -(-int(self.lengths[-1]) // self.block)
        self.rows: NDArray[np.float32] = np.full(((k - 1) * self.g * self.f + last, self.block), np.nan, np.float32)
        """(K G F, L) float32, one block per row; the last chunk has only the blocks it needs."""
        self.values: NDArray[np.float32] = self.rows.reshape(-1)
        """(K G F L,) the same memory, flat."""
        self.codes: NDArray[np.uint8] = np.zeros(self.values.shape, np.uint8)
        """(K G F L,) the age of each example, as a code of ``example_ages``, which changes it before the weights."""
        self.sums = SumTree(k, self.g, self.f, np.float64)
        """Σ u over the scored examples."""
        self.scored = SumTree(k, self.g, self.f, np.int32)
        self.unscored = n
        """Examples without a weight, of all N."""
        self.fresh_sums = SumTree(k, self.g, self.f, np.float64) if faded else self.sums
        """Σ r u over the scored examples."""
        self.fresh = SumTree(k, self.g, self.f, np.float64) if faded else self.scored
        """Σ r over the scored examples."""
        upper, lower = (self.fresh_sums.groups, self.fresh.groups), (self.fresh_sums.blocks, self.fresh.blocks)
        self.levels = upper, lower
        """From a chunk down: Σ r u and Σ r of its groups (K, G), then of each group's blocks (K G, F)."""
        inside = (self.block,) if self.part == self.block else (self.block // self.part, self.part)
        self.fanouts = self.g, self.f, *inside
        """Groups in a chunk, blocks in a group, parts in a block if it has several, examples in a part."""
        self.units = tuple(math.prod(self.fanouts[level + 1 :]) for level in range(len(self.fanouts)))
        """Examples in a group, in a block, in a part, in an example."""
        self.extents = tuple(np.arange(1.0, f + 1.0) * unit for f, unit in zip(self.fanouts, self.units, strict=True))
        """Per level, (fanout,) examples up to the end of each column."""
        self._squares = SumTree(k, self.g, self.f, np.float64)
        self._smallest = SumTree(k, self.g, self.f, np.float32, math.inf, row_minima)
        self._fresh_squares = [SumTree(k, self.g, self.f, np.float64) for _ in range(3 if faded else 0)]
        """Σ r², Σ r² u and Σ r² u², if they are not the scored examples, Σ u and Σ u²."""
        self._newest = SumTree(k, self.g, self.f, np.uint8, 0, row_maxima)
        self._norms = [SumTree(k, self.g, self.f, np.float64) for _ in range(0 if exponent == 1 else 2)]
        """Σ w and Σ w², if they are not Σ u and Σ u²."""
        self._changed: NDArray[np.bool_] = np.zeros(len(self.rows), bool)
        """(K G F,) the blocks changed since the last report."""

    @property
    def arrays(self) -> list[NDArray[np.generic]]:
        """Every array that changes."""
        trees = [self.sums, self.scored, self._squares, self._smallest, *self._norms]
        if self.faded:
            trees += [self.fresh_sums, self.fresh, self._newest, *self._fresh_squares]
        return [
            self.values,
            self.codes,
            self._changed,
            *(level for tree in trees for level in (tree.blocks, tree.groups, tree.chunks)),
        ]

    def fresh_squares(self) -> tuple[Floats, Floats, Floats]:
        """Return Σ r², Σ r² u and Σ r² u², each (K,), over the scored examples."""
        self._recompute()
        first, second, third = self._fresh_squares or (self.scored, self.sums, self._squares)
        return first.chunks, second.chunks, third.chunks

    @property
    def newest(self) -> Floats:
        """(K,) the largest r."""
        self._recompute()
        return FRESHNESS.take(self._newest.chunks)

    @property
    def smallest(self) -> Floats:
        """(K,) the smallest u, infinite if nothing is scored."""
        self._recompute()
        return self.to_power(self._smallest.chunks.astype(np.float64))

    def norm_sums(self) -> tuple[float, float]:
        """Return Σ w and Σ w² over the scored examples."""
        self._recompute()
        norms, squares = self._norms or (self.sums, self._squares)
        return float(norms.chunks.sum()), float(squares.chunks.sum())

    def chunk(self, chunk: int) -> NDArray[np.float32]:
        """Return (chunk_len,) a view of one chunk's weights, float32."""
        start = chunk * self.g * self.f * self.block
        return self.values[start : start + self.lengths[chunk]]

    def chunk_codes(self, chunk: int) -> NDArray[np.uint8]:
        """Return (chunk_len,) a view of one chunk's age codes."""
        start = chunk * self.g * self.f * self.block
        return self.codes[start : start + self.lengths[chunk]]

    def places(self, indices: Integers) -> Integers:
        """Return (B,) where ``indices`` (B,) lie in ``values``."""
        padding = self.g * self.f * self.block - self.chunk_size
        return indices + indices // self.chunk_size * padding if padding else indices

    def to_power(self, weights: Floats) -> Floats:
        """Return the weights raised to the power ``exponent``."""
        return weights if self.exponent == 1 else weights**self.exponent

    def freshness(self, rows: Integers, width: int) -> Floats:
        """Return (B, ``width``) the r of ``rows`` (B,), blocks or parts of so many examples."""
        return FRESHNESS.take(self.codes.reshape(-1, width).take(rows, axis=0))

    def put(self, chunk: int, weights: NDArray[np.float32]) -> None:
        """Replace all weights of a chunk, (chunk_len,); O(chunk)."""
        self.chunk(chunk)[:] = _in_range(weights)
        first = chunk * self.g * self.f
        blocks = np.arange(first, min(first + self.g * self.f, len(self.rows)))
        rows = self.rows[first : first + len(blocks)]
        before = int(self.scored.chunks[chunk])
        self.scored.put_chunk(chunk, (~np.isnan(rows)).sum(axis=1, dtype=np.int32))
        self.unscored += before - int(self.scored.chunks[chunk])
        self.sums.put_chunk(chunk, self._sum(rows))
        if self.faded:
            for tree, values in zip((self.fresh_sums, self.fresh), self._sum_fresh(rows, blocks), strict=True):
                tree.put_chunk(chunk, values)
        self._changed[blocks] = True

    def scatter(self, places: Integers, weights: NDArray[np.float32]) -> None:
        """Replace the weights at ``places`` (B,), none with NaN; if a place is given twice, its last weight counts."""
        blocks = places // self.block
        adds = self.unscored > 0 and bool(np.isnan(self.values.take(places)).any())
        self.values[places] = _in_range(weights)
        rows = self.rows.take(blocks, axis=0)
        if adds:
            self.scored.put(blocks, (~np.isnan(rows)).sum(axis=1, dtype=np.int32))
            self.unscored = self.n - int(self.scored.chunks.sum())
        self.sums.put(blocks, self._sum(rows))
        if self.faded:
            for tree, values in zip((self.fresh_sums, self.fresh), self._sum_fresh(rows, blocks), strict=True):
                tree.put(blocks, values)
        self._changed[blocks] = True

    def _sum(self, rows: NDArray[np.float32]) -> Floats:
        u = self.to_power(rows.astype(np.float64))
        total = row_sums(u)
        return row_sums(np.nan_to_num(u, copy=False)) if np.isnan(total).any() else total

    def _sum_fresh(self, rows: NDArray[np.float32], blocks: Integers) -> tuple[Floats, Floats]:
        r = self.freshness(blocks, self.block)
        r[np.isnan(rows)] = 0.0
        u = np.nan_to_num(self.to_power(rows.astype(np.float64)), copy=False)
        return np.einsum("bl,bl->b", r, u), row_sums(r)

    def _recompute(self) -> None:
        blocks = np.flatnonzero(self._changed)
        if not len(blocks):
            return
        self._changed[:] = False
        # A slice of blocks at a time: a chunk of 10^8 examples must not become float64 at once.
        for part in np.array_split(blocks, -(-len(blocks) // 4096)):
            rows = self.rows.take(part, axis=0)
            w = np.nan_to_num(rows.astype(np.float64), copy=False)
            u = self.to_power(w)
            self._squares.put(part, np.einsum("bl,bl->b", u, u))
            for power, level in enumerate(self._norms, 1):
                level.put(part, (w**power).sum(axis=1))
            self._smallest.put(part, np.fmin.reduce(rows, axis=1, initial=np.float32(math.inf)))
            if self.faded:
                squares = np.where(np.isnan(rows), 0.0, np.square(self.freshness(part, self.block)))
                for power, level in enumerate(self._fresh_squares):
                    level.put(part, np.einsum("bl,bl->b", squares, u**power))
                self._newest.put(part, self.codes.reshape(self.rows.shape).take(part, axis=0).max(axis=1))


def _in_range(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    # A NaN compares false and stays.
    return np.where(weights < SMALLEST, np.float32(0), np.minimum(weights, np.float32(LARGEST)))
