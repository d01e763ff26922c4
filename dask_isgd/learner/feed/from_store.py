"""Rows straight out of the store, a chunk decoded for nearly each: right, and slow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.learner.feed.source import Draws, RowSource
from dask_isgd.storage import Dataset, Rows


class FromStore(RowSource):
    """Holds nothing: the last resort, where neither memory nor disk may be used."""

    def __init__(self, dataset: Dataset, draws: Draws, why: str) -> None:
        super().__init__(draws, why)
        self._dataset = dataset

    def gather(self, indices: NDArray[np.int64]) -> Rows:
        return self._dataset.rows(indices)
