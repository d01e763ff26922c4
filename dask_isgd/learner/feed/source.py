"""The interfaces of the feed: what chooses minibatches, and what supplies their rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.sampling import Draw
from dask_isgd.storage import Rows


class RowRange(NamedTuple):
    """A range of n neighbouring examples, chosen with the probability that one of them is drawn."""

    start: int
    """The first of the n examples."""
    probabilities: NDArray[np.float64]
    """(n,) q of each, in force when they were picked; the run was picked with probability Σ q."""
    examples: float
    """Examples in use: N, less those that a ``drop`` policy leaves out."""


class DrawSource(Protocol):
    """The proposal in force. The feed calls it from its own thread, so implementations must lock."""

    def draw(self, step: int) -> Draw:
        """Return the minibatch of a step."""

    def run(self, size: int, generator: np.random.Generator) -> RowRange:
        """Draw one example and return the range of ``size`` examples around it, on a grid of ``size``."""

    def probabilities(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the current q (B,) of ``indices`` (B,)."""

    def positions(self, step: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """Return the positions (B,) in [0, 1) of a step's minibatch, spread as the sampling scheme requires."""

    def unreadable(self, error: DataError) -> None:
        """Exclude the examples ``error.rows`` if the run may continue without them; else raise ``error``."""


class Source(Protocol):
    """A supplier of minibatches."""

    reason: str
    """Which source was chosen, and for what reason."""
    in_memory: bool

    def minibatch(self, step: int) -> tuple[Draw, Rows]:
        """Return the draw of a step and its rows, in the order of the draw."""

    def close(self) -> None:
        """Release memory, files and threads."""


class RowSource(ABC):
    """A source that can supply any row, so that the draw need not depend on where rows are stored."""

    in_memory = False

    def __init__(self, draws: DrawSource, reason: str) -> None:
        self._draws = draws
        self.reason = reason

    def minibatch(self, step: int) -> tuple[Draw, Rows]:
        while True:
            draw = self._draws.draw(step)
            try:
                return draw, self.gather(draw.indices)
            except DataError as error:
                self._draws.unreadable(error)

    @abstractmethod
    def gather(self, indices: NDArray[np.int64]) -> Rows:
        """Return the rows (B, ...) of ``indices`` (B,), in that order."""

    def close(self) -> None:
        return None
