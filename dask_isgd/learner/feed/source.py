"""What every source of rows can do, and what it asks of whoever draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.sampling import Draw
from dask_isgd.storage import Rows


class RowRange(NamedTuple):
    """Neighbouring examples, picked with the probability that one of them is drawn."""

    start: int
    """The first of the n examples."""
    probabilities: NDArray[np.float64]
    """(n,) q of each, in force when they were picked; the run was picked with probability Σ q."""
    examples: float
    """Examples in use: N, less those a ``drop`` policy leaves out."""


class Draws(Protocol):
    """The proposal in force. Called from the feed's thread: it locks."""

    def draw(self, step: int) -> Draw:
        """The minibatch of a step."""

    def run(self, size: int, generator: np.random.Generator) -> RowRange:
        """The run of ``size`` examples, on the grid of ``size``, around one example that is drawn."""

    def probabilities(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B,) q in force of ``indices`` (B,)."""

    def positions(self, step: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """(B,) positions in [0, 1) of a step's minibatch, spread as the run wants its draws spread."""

    def unreadable(self, error: DataError) -> None:
        """Draw no more of the examples ``error.rows``, if the run is to go on without them; else raise ``error``."""


class Source(Protocol):
    """Where minibatches come from."""

    why: str
    """Which way was chosen, and why."""
    in_memory: bool

    def minibatch(self, step: int) -> tuple[Draw, Rows]:
        """The draw of a step and its rows, in the order of the draw."""

    def close(self) -> None:
        """Give back memory, files and threads."""


class RowSource(ABC):
    """A source that gives any rows, so that whoever draws need not know where they lie."""

    in_memory = False

    def __init__(self, draws: Draws, why: str) -> None:
        self._draws = draws
        self.why = why

    def minibatch(self, step: int) -> tuple[Draw, Rows]:
        while True:
            draw = self._draws.draw(step)
            try:
                return draw, self.gather(draw.indices)
            except DataError as error:
                self._draws.unreadable(error)

    @abstractmethod
    def gather(self, indices: NDArray[np.int64]) -> Rows:
        """The rows (B, ...) of ``indices`` (B,), in their order."""

    def close(self) -> None:
        return None
