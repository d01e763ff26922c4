"""Rows straight from the store; nearly every row decodes a chunk, so it is slow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.learner.feed.source import DrawSource, RowSource
from dask_isgd.storage import Dataset, Rows


class FromStore(RowSource):
    """Holds nothing: the last resort if neither memory nor disk suffices."""

    def __init__(self, dataset: Dataset, draws: DrawSource, reason: str) -> None:
        super().__init__(draws, reason)
        self._dataset = dataset

    def gather(self, indices: NDArray[np.int64]) -> Rows:
        return self._dataset.rows(indices)
