"""Sums per block, per group of blocks and per chunk, kept exact under scattered changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Integers

Reduce = Callable[[NDArray[Any]], NDArray[Any]]


def row_sums(rows: NDArray[Any]) -> NDArray[Any]:
    """Return (B,) the sums of (B, m): einsum takes half the time of ``sum`` for short rows."""
    return np.asarray(np.einsum("bm->b", rows))


def row_minima(rows: NDArray[Any]) -> NDArray[Any]:
    """Return (B,) the minima of (B, m)."""
    return np.asarray(np.minimum.reduce(rows, axis=1))


def row_maxima(rows: NDArray[Any]) -> NDArray[Any]:
    """Return (B,) the maxima of (B, m)."""
    return np.asarray(np.maximum.reduce(rows, axis=1))


class SumTree:
    """One number per block, and what ``reduce`` makes of them per group and per chunk.

    A level is always recomputed from the level below, never adjusted by differences, so that nothing can drift.
    There are K chunks of G groups of F blocks.
    """

    def __init__(self, k: int, g: int, f: int, dtype: type[np.generic], empty: float = 0.0, reduce: Reduce = row_sums):
        self._g, self._f, self._reduce = g, f, reduce
        self.blocks: NDArray[Any] = np.full((k * g, f), empty, dtype)
        """(K G, F)"""
        self.groups: NDArray[Any] = np.full((k, g), empty, dtype)
        """(K, G)"""
        self.chunks: NDArray[Any] = np.full(k, empty, dtype)
        """(K,)"""

    def put(self, blocks: Integers, values: NDArray[Any]) -> None:
        """Replace the numbers of ``blocks`` (B,); a block given twice must have the same number both times."""
        self.blocks.reshape(-1)[blocks] = values
        groups = blocks // self._f
        self._update(groups, self.blocks, self.groups.reshape(-1))
        self._update(groups // self._g, self.groups, self.chunks)

    def put_chunk(self, chunk: int, values: NDArray[Any]) -> None:
        """Replace the numbers of a chunk's blocks: (G F,), or fewer if the remaining blocks are empty."""
        rows = slice(chunk * self._g, (chunk + 1) * self._g)
        self.blocks[rows].reshape(-1)[: len(values)] = values
        self.groups[chunk] = self._reduce(self.blocks[rows])
        self.chunks[chunk] = self._reduce(self.groups[chunk : chunk + 1])[0]

    def _update(self, changed: Integers, below: NDArray[Any], above: NDArray[Any]) -> None:
        if len(changed) < len(above):
            above[changed] = self._reduce(below.take(changed, axis=0))
        else:  # each sum once is cheaper than many of them repeatedly
            above[:] = self._reduce(below)
