"""The whole dataset in one array each: the fastest there is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.learner.feed.source import Draws, RowSource
from dask_isgd.storage import Dataset, Rows


class InMemory(RowSource):
    """Holds ``dataset.nbytes``."""

    in_memory = True

    def __init__(self, dataset: Dataset, draws: Draws, why: str) -> None:
        super().__init__(draws, why)
        self._rows = dataset.load(draws.unreadable)

    def gather(self, indices: NDArray[np.int64]) -> Rows:
        return Rows(tuple(x.take(indices, axis=0) for x in self._rows.inputs), self._rows.target.take(indices, axis=0))
