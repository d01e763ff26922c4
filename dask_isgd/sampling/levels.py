"""Sums over blocks, over groups of blocks and over chunks, kept exact under scattered changes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Integers


class Levels:
    """One number a block, and what ``reduce`` makes of them per group and per chunk.

    Always recounted from the level below, never adjusted by differences: nothing can drift. K chunks
    of G groups of F blocks.
    """

    def __init__(
        self, k: int, g: int, f: int, dtype: type[np.generic], *, empty: float = 0.0, reduce: np.ufunc = np.add
    ) -> None:
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
        rows = self.blocks.take(groups, axis=0)
        self.groups.reshape(-1)[groups] = self._reduce.reduce(rows, axis=1)
        chunks = groups // self._g
        self.chunks[chunks] = self._reduce.reduce(self.groups.take(chunks, axis=0), axis=1)

    def put_chunk(self, chunk: int, values: NDArray[Any]) -> None:
        """New numbers of all the blocks of a chunk: (G F,), or less where the others hold nothing."""
        mine = slice(chunk * self._g, (chunk + 1) * self._g)
        self.blocks[mine].reshape(-1)[: len(values)] = values
        self.groups[chunk] = self._reduce.reduce(self.blocks[mine], axis=1)
        self.chunks[chunk] = self._reduce.reduce(self.groups[chunk])
