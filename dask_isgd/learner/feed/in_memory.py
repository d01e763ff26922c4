"""The complete dataset in memory, the fastest source."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.learner.feed.source import DrawSource, RowSource
from dask_isgd.storage import Dataset, Rows


class InMemory(RowSource):
    """All rows, which take ``dataset.nbytes`` bytes."""

    in_memory = True

    def __init__(self, dataset: Dataset, draws: DrawSource, reason: str) -> None:
        super().__init__(draws, reason)
        self._rows = dataset.load(draws.unreadable)

    def gather(self, indices: NDArray[np.int64]) -> Rows:
        return Rows(tuple(x.take(indices, axis=0) for x in self._rows.inputs), self._rows.target.take(indices, axis=0))
