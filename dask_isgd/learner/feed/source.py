"""The interfaces of the feed: what chooses minibatches, and what supplies their rows."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.sampling import Draw
from dask_isgd.storage import Rows


class DrawSource(Protocol):
    """The proposal in force. The feed calls it from its own thread, so implementations must lock."""

    gate_step: int
    """The step after which the gate last opened or closed; -1: never."""

    def draw(self, step: int, attempt: int = 0) -> Draw:
        """Return the minibatch of a step; each ``attempt`` draws another one, if the former cannot be read."""

    def unreadable(self, error: DataError) -> None:
        """Exclude the examples ``error.rows`` if the run may continue without them; else raise ``error``."""


class Source(Protocol):
    """A supplier of minibatches."""

    reason: str
    """Which source was chosen, and for what reason."""
    in_memory: bool
    chunks_read: int
    """Chunks read so far, if several are read for a minibatch: the wait for it lasts while the number grows."""
    lookahead: int
    """Steps beyond the one that is asked for whose minibatches are drawn with it, at most."""

    def minibatch(self, step: int, until: int) -> tuple[Draw, Rows]:
        """Return the draw of a step and its rows, in the order of the draw; nothing is drawn for ``until`` or later."""

    def interrupt(self) -> None:
        """End a wait in ``minibatch``, in another thread, with an error."""

    def close(self) -> None:
        """Release memory, files and threads."""


class RowSource(ABC):
    """A source that can supply any row, so that the draw need not depend on where rows are stored."""

    in_memory = False
    chunks_read = lookahead = 0

    def __init__(self, draws: DrawSource, reason: str) -> None:
        self._draws = draws
        self.reason = reason

    def minibatch(self, step: int, until: int) -> tuple[Draw, Rows]:
        for attempt in itertools.count():
            draw = self._draws.draw(step, attempt)
            try:
                return draw, self.gather(draw.indices)
            except DataError as error:
                self._draws.unreadable(error)
        raise AssertionError  # never: an endless loop

    @abstractmethod
    def gather(self, indices: NDArray[np.int64]) -> Rows:
        """Return the rows (B, ...) of ``indices`` (B,), in that order."""

    def interrupt(self) -> None:
        return None

    def close(self) -> None:
        return None
