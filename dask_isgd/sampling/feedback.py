"""Which examples hold a norm from the learner's own backward pass that is newer than their chunk's scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Floats, Integers


class Feedback:
    """One bit per example, and for each chunk the step of its oldest feedback."""

    def __init__(self, n: int, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        chunks = -(-n // chunk_size)
        self.bits: NDArray[np.uint8] = np.zeros((chunks, -(-chunk_size // 8)), np.uint8)
        self.oldest: Floats = np.full(chunks, np.nan)
        """(n_chunks,) the smallest step among the marked examples; NaN if none is marked."""

    @property
    def arrays(self) -> list[NDArray[np.generic]]:
        """Every array that changes."""
        return [self.bits, self.oldest]

    def mark(self, indices: Integers, step: int) -> None:
        """Record that the norms of ``indices`` (B,) were fed back at ``step``."""
        chunks, inside = np.divmod(indices, self.chunk_size)
        # Not |=: two examples of one byte would overwrite each other.
        np.bitwise_or.at(self.bits, (chunks, inside >> 3), (1 << (inside & 7)).astype(np.uint8))
        self.oldest[chunks] = np.fmin(self.oldest[chunks], step)

    def newer(self, chunk: int, version: int, length: int) -> NDArray[np.bool_]:
        """Return (length,) the marked examples of a chunk if all are newer than ``version``; else none, and unmark."""
        if self.oldest[chunk] > version:
            return np.unpackbits(self.bits[chunk], count=length, bitorder="little").astype(bool)
        self.bits[chunk] = 0
        self.oldest[chunk] = np.nan
        return np.zeros(length, bool)
