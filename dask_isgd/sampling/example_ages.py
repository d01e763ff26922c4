"""How old the weight of each example is: as old as its chunk's scores, or as newer feedback.

Each chunk has a base, the version of its scores, and each example a code of one byte: its weight dates from ``unit`` ×
code steps after the base (rounded down, so that no weight passes for newer than it is). With fading, a unit is an
eighth of the half-life, so an example keeps::

    2^(-(step - base)/half_life) × 2^(code/8)

of its weight: time enters through the chunk's factor alone, and the sums of weights × 2^(code/8) only change if
weights do. If a code would exceed 255, the chunk's base moves up, and what lies before the new base counts as being
that old: 16 half-lives or more older than the newest.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling.draws import Floats, Integers

CODES_PER_HALF_LIFE = 8
FRESHNESS: Floats = np.exp2(np.arange(256) / CODES_PER_HALF_LIFE)
"""(256,) by code: how many times as much of its weight an example keeps as the base of its chunk."""
_PLAIN_UNIT = 8.0
"""Steps per code without fading, which only decides whether feedback is newer than scores."""
_MIDDLE = 128
"""The newest code after a base has moved."""
_ROUNDING = 1e-6


class ExampleAges:
    """The codes of all examples, laid out as their weights are, and the bases of the K chunks.

    ``codes`` (M,) uint8, in which chunk k begins at k × ``stride``. ``half_life``: of fading, in steps, or None.
    """

    def __init__(self, codes: NDArray[np.uint8], chunks: int, stride: int, half_life: float | None) -> None:
        self.codes, self._stride = codes, stride
        self.unit = _PLAIN_UNIT if half_life is None else half_life / CODES_PER_HALF_LIFE
        self.base: Floats = np.full(chunks, np.nan)
        """(K,) step at which code 0 was computed; NaN if the chunk has no weight."""

    def elapsed(self, chunks: Integers, places: Integers, step: float) -> Floats:
        """Return (B,) how many steps before ``step`` the weights at ``places`` in ``chunks`` were computed.

        To within a unit, and at least 0; NaN in a chunk that has no weight.
        """
        return np.asarray(np.maximum(0.0, step - self.base.take(chunks) - self.unit * self.codes.take(places)))

    def elapsed_of_chunk(self, chunk: int, step: float, length: int) -> Floats:
        """Return (length,) the same for the examples of a chunk."""
        return np.asarray(np.maximum(0.0, step - self.base[chunk] - self.unit * self._codes(chunk, length)))

    def mark(self, chunks: Integers, places: Integers, step: float) -> list[int]:
        """Record that the examples at ``places`` (B,) in ``chunks`` (B,) were fed back at ``step``.

        Returns the chunks whose base moved, so that the codes of all their examples changed.
        """
        base = self.base.take(chunks)
        new = np.isnan(base)
        if new.any():
            # One unit earlier: code 0 is never newer than scores.
            self.base[chunks[new]] = base[new] = step - self.unit
        codes = np.floor((step - base) / self.unit + _ROUNDING)
        moved: list[int] = []
        if codes.max() > 255:
            moved = np.unique(chunks[codes > 255]).tolist()
            for chunk in moved:
                self._move(chunk, int(np.floor((step - self.base[chunk]) / self.unit + _ROUNDING)) - _MIDDLE)
            codes = np.floor((step - self.base.take(chunks)) / self.unit + _ROUNDING)
        self.codes[places] = np.maximum(codes, 0.0).astype(np.uint8)
        return moved

    def rescore(self, chunk: int, version: int, length: int) -> NDArray[np.bool_]:
        """Record that a chunk of ``length`` examples was scored at ``version``.

        Returns (length,) whose feedback is at least as new, and is kept.
        """
        codes, base = self._codes(chunk, length), float(self.base[chunk])
        self.base[chunk] = version
        newest = int(codes.max())
        behind = math.ceil((version - base) / self.unit - _ROUNDING) if newest else 0
        if newest < max(behind, 1):
            codes[:] = 0
            return np.zeros(length, bool)
        kept: NDArray[np.bool_] = codes >= max(behind, 1)
        shift = behind if newest - behind <= 255 else newest - _MIDDLE
        self.base[chunk] += (shift - behind) * self.unit
        _lower(codes, shift)
        codes *= kept
        return kept

    def _move(self, chunk: int, units: int) -> None:
        """Move the base of a chunk up; what is older counts as new as the base."""
        self.base[chunk] += units * self.unit
        _lower(self._codes(chunk, self._stride), min(units, 255))

    def _codes(self, chunk: int, length: int) -> NDArray[np.uint8]:
        return self.codes[chunk * self._stride : chunk * self._stride + length]


def _lower(codes: NDArray[np.uint8], shift: int) -> None:
    """Subtract ``shift``, which may be negative if no code then exceeds 255, in place; what is below becomes zero."""
    np.maximum(codes, max(shift, 0), out=codes)
    codes -= np.uint8(max(shift, 0))
    codes += np.uint8(max(-shift, 0))
