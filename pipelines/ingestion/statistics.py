"""Means and deviations of data that are read block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError

MODES = ("auto", "all", "each", "first", "last", "none")


@dataclass
class Moments:
    """A count, and for each number of a row its mean and its sum of squared differences from the mean."""

    count: int
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Moments:
        """Return the moments of a block (n, ...), computed in float64."""
        wide = rows.astype(np.float64)
        mean = wide.mean(axis=0)
        np.subtract(wide, mean, out=wide)
        return cls(len(rows), mean, np.square(wide, out=wide).sum(axis=0))

    def __add__(self, other: Moments) -> Moments:
        """Merge by the rule of Chan, Golub and LeVeque, which never subtracts large sums."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        spread = self.spread + other.spread + difference**2 * (self.count * other.count / count)
        return Moments(count, mean, spread)

    def constants(self, mode: str) -> dict[str, NDArray[np.float64]]:
        """Return mean and deviation for a mode of `ingest`; a number that never changes gets a deviation of 1."""
        kept = {"all": (), "each": tuple(range(self.mean.ndim)), "first": (0,), "last": (self.mean.ndim - 1,)}[mode]
        others = tuple(axis for axis in range(self.mean.ndim) if axis not in kept)
        mean = self.mean.mean(axis=others, keepdims=True)
        variance = (self.spread / self.count + (self.mean - mean) ** 2).mean(axis=others, keepdims=True)
        if mode == "all":
            mean, variance = mean.reshape(()), variance.reshape(())
        std = np.sqrt(variance)
        return {"mean": mean, "std": np.where(std > 0, std, 1.0)}


def mode_of(mode: str, dtype: np.dtype, shape: Sequence[int]) -> str:
    """Return the mode, with ``"auto"`` resolved: tokens and other integers are not normalised."""
    if mode not in MODES:
        raise DataError(f"normalise: got {mode!r}, wanted one of {', '.join(map(repr, MODES))}")
    if mode != "auto":
        return "all" if not shape and mode != "none" else mode
    if dtype.kind == "f":
        return "each" if len(shape) == 1 else "all"
    return "all" if dtype == np.uint8 and len(shape) >= 2 else "none"
