"""Stored weights with their sums: per block of a chunk, and per chunk."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Floats, Integers

LARGEST, SMALLEST = 1e36, 1e-36
"""Larger weights count as the one, smaller as zero: squares of their fourth powers, times N, are still float64s."""
LEAST_BLOCK = 64
"""Examples: sums of smaller blocks would outweigh the weights."""


class BlockedWeights:
    """N float32 weights, NaN where never scored, in chunks of blocks of about sqrt(chunk) examples.

    Sums are of the weights raised to ``power``, accumulated in float64, and always recounted from the
    weights of the blocks touched, never adjusted by differences: they cannot drift.

    Letters: K chunks, J blocks a chunk, L examples a block (the last block of a chunk may be shorter).
    """

    def __init__(self, n: int, chunk_size: int, power: float) -> None:
        self.n, self.chunk_size, self.power = n, chunk_size, power
        self.block_size = min(chunk_size, max(LEAST_BLOCK, 2 ** round(math.log2(chunk_size) / 2)))
        self.values: NDArray[np.float32] = np.full(n, np.nan, np.float32)
        k, j = -(-n // chunk_size), -(-chunk_size // self.block_size)
        self.lengths: Integers = np.minimum(chunk_size, n - chunk_size * np.arange(k, dtype=np.int64))
        rows = 2 if power == 1 else 4
        self.block_moments: Floats = np.zeros((rows, k, j))
        """Σ w^p, Σ w^2p and, unless p = 1, Σ w, Σ w²: the first two are the proposal's, the last two the norms'."""
        self.block_lowest: Floats = np.full((k, j), np.inf)
        self.block_scored: NDArray[np.int32] = np.zeros((k, j), np.int32)
        self.moments: Floats = np.zeros((rows, k))
        self.lowest: Floats = np.full(k, np.inf)
        self.scored: Integers = np.zeros(k, np.int64)
        self._lanes = np.arange(self.block_size)

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, by name."""
        names = ("values", "block_moments", "block_lowest", "block_scored", "moments", "lowest", "scored")
        return {name: getattr(self, name) for name in names}

    def chunk(self, chunk: int) -> NDArray[np.float32]:
        """(chunk_len,) float32: a view of one chunk's weights."""
        start = chunk * self.chunk_size
        return self.values[start : start + int(self.lengths[chunk])]

    def block_lengths(self, chunks: Integers) -> Integers:
        """(B, J) examples in each block of each of B chunks."""
        starts = self.block_size * np.arange(self.block_lowest.shape[1])
        return np.asarray(np.clip(self.lengths[chunks, None] - starts, 0, self.block_size))

    def gather(self, chunks: Integers, blocks: Integers) -> tuple[Floats, NDArray[np.bool_]]:
        """(B, L) float64 weights of B blocks, NaN where unscored, and which of them exist (B, L)."""
        starts = blocks * self.block_size
        lengths = np.minimum(self.lengths[chunks] - starts, self.block_size)
        indices = (chunks * self.chunk_size + starts)[:, None] + self._lanes
        return self.values.take(indices, mode="clip").astype(np.float64), self._lanes < lengths[:, None]

    def raised(self, weights: Floats) -> Floats:
        """Weights to the power the proposal asks for."""
        return weights if self.power == 1 else weights**self.power

    def put(self, chunk: int, weights: NDArray[np.float32]) -> None:
        """Replace a whole chunk: O(chunk)."""
        self.chunk(chunk)[:] = _in_range(weights)
        blocks = np.arange(self.block_lowest.shape[1])
        self._recount(np.full_like(blocks, chunk), blocks)

    def scatter(self, indices: Integers, weights: NDArray[np.float32]) -> None:
        """Replace single weights; of an index given twice the last counts. O(blocks touched)."""
        self.values[indices] = _in_range(weights)
        chunks, inside = np.divmod(indices, self.chunk_size)
        j = self.block_lowest.shape[1]
        touched = np.unique(chunks * j + inside // self.block_size)
        self._recount(*np.divmod(touched, j))

    def _recount(self, chunks: Integers, blocks: Integers) -> None:
        weights, exists = self.gather(chunks, blocks)
        known = exists & ~np.isnan(weights)
        weights = np.where(known, weights, 0.0)
        raised = self.raised(weights)
        moments = [raised.sum(axis=1), (raised * raised).sum(axis=1)]
        if self.power != 1:
            moments += [weights.sum(axis=1), (weights * weights).sum(axis=1)]
        self.block_moments[:, chunks, blocks] = moments
        self.block_lowest[chunks, blocks] = np.where(known, raised, np.inf).min(axis=1)
        self.block_scored[chunks, blocks] = known.sum(axis=1)
        touched = np.unique(chunks)
        self.moments[:, touched] = self.block_moments[:, touched].sum(axis=-1)
        self.lowest[touched] = self.block_lowest[touched].min(axis=1)
        self.scored[touched] = self.block_scored[touched].sum(axis=1)


def _in_range(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    # A NaN compares false and stays.
    return np.where(weights < SMALLEST, np.float32(0), np.minimum(weights, np.float32(LARGEST)))
