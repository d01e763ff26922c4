"""Which examples have a norm from the learner's own pass that is newer than their chunk's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Floats, Integers


class Feedback:
    """One bit an example, and the step of the oldest such feedback of each chunk."""

    def __init__(self, n: int, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        chunks = -(-n // chunk_size)
        self.bits: NDArray[np.uint8] = np.zeros((chunks, -(-chunk_size // 8)), np.uint8)
        self.oldest: Floats = np.full(chunks, np.nan)
        """(n_chunks,) least step among the marked, NaN: none is."""

    @property
    def arrays(self) -> list[NDArray[np.generic]]:
        """Everything that changes."""
        return [self.bits, self.oldest]

    def mark(self, indices: Integers, step: int) -> None:
        """Remember that ``indices`` were seen at ``step``."""
        chunks, inside = np.divmod(indices, self.chunk_size)
        # Not |=: two examples of one byte would overwrite each other.
        np.bitwise_or.at(self.bits, (chunks, inside >> 3), (1 << (inside & 7)).astype(np.uint8))
        self.oldest[chunks] = np.fmin(self.oldest[chunks], step)

    def newer(self, chunk: int, version: int, length: int) -> NDArray[np.bool_]:
        """(length,) the marked examples if all of them are newer than ``version``; else none, and forget them."""
        if self.oldest[chunk] > version:
            return np.unpackbits(self.bits[chunk], count=length, bitorder="little").astype(bool)
        self.bits[chunk] = 0
        self.oldest[chunk] = np.nan
        return np.zeros(length, bool)
