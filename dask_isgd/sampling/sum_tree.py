"""Sums over blocks, over groups of blocks and over chunks, kept exact under scattered changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Integers

Reduce = Callable[[NDArray[Any]], NDArray[Any]]


def add(rows: NDArray[Any]) -> NDArray[Any]:
    """(B,) sums of (B, m): einsum does short rows at half the cost of ``sum``."""
    return np.asarray(np.einsum("bm->b", rows))


def least(rows: NDArray[Any]) -> NDArray[Any]:
    """(B,) minima of (B, m)."""
    return np.asarray(np.minimum.reduce(rows, axis=1))


class SumTree:
    """One number a block, and what ``reduce`` makes of them per group and per chunk.

    Always recounted from the level below, never adjusted by differences: nothing can drift. K chunks
    of G groups of F blocks.
    """

    def __init__(self, k: int, g: int, f: int, dtype: type[np.generic], empty: float = 0.0, reduce: Reduce = add):
        self._g, self._f, self._reduce = g, f, reduce
        self.blocks: NDArray[Any] = np.full((k * g, f), empty, dtype)
        """(K G, F)"""
        self.groups: NDArray[Any] = np.full((k, g), empty, dtype)
        """(K, G)"""
        self.chunks: NDArray[Any] = np.full(k, empty, dtype)
        """(K,)"""

    def put(self, blocks: Integers, values: NDArray[Any]) -> None:
        """New numbers of ``blocks`` (B,); of a block named twice both must be the same."""
        self.blocks.reshape(-1)[blocks] = values
        groups = blocks // self._f
        self._lift(groups, self.blocks, self.groups.reshape(-1))
        self._lift(groups // self._g, self.groups, self.chunks)

    def put_chunk(self, chunk: int, values: NDArray[Any]) -> None:
        """New numbers of all the blocks of a chunk: (G F,), or less where the others hold nothing."""
        mine = slice(chunk * self._g, (chunk + 1) * self._g)
        self.blocks[mine].reshape(-1)[: len(values)] = values
        self.groups[chunk] = self._reduce(self.blocks[mine])
        self.chunks[chunk] = self._reduce(self.groups[chunk : chunk + 1])[0]

    def _lift(self, touched: Integers, below: NDArray[Any], above: NDArray[Any]) -> None:
        if len(touched) < len(above):
            above[touched] = self._reduce(below.take(touched, axis=0))
        else:  # the same sums, most of them once instead of often
            above[:] = self._reduce(below)
