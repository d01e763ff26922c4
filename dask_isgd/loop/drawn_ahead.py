"""Which minibatches a DataLoader has taken ahead, and which of them the loop has consumed."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from dask_isgd.errors import DataError
from dask_isgd.sampling import Draw
from dask_isgd.sampling.draws import Integers

_MOST = 1024
"""Minibatches remembered; of more, the oldest count as consumed."""


class Minibatch(NamedTuple):
    """One minibatch that was handed out."""

    step: int
    draw: Draw
    """All of it, in a group of processes the global one."""


class DrawnAhead:
    """The minibatches handed out, oldest first, up to the latest that was consumed.

    ``share``: the rows of a global minibatch that this process hands out.
    """

    def __init__(self, share: slice) -> None:
        self._share = share
        self._waiting: deque[Minibatch] = deque(maxlen=_MOST)
        self.reports = False
        """Whether the loop reports what it consumes; otherwise all that was handed out counts as consumed."""

    def add(self, minibatch: Minibatch) -> None:
        """Remember a minibatch that is handed out."""
        self._waiting.append(minibatch)

    def consume(self, indices: Integers) -> Minibatch:
        """Return the oldest minibatch whose share is ``indices`` (B,); it and all before it are consumed.

        Raises DataError, and nothing is consumed, if there is none.
        """
        wanted = indices.tobytes()
        for place, minibatch in enumerate(self._waiting):
            if minibatch.draw.indices[self._share].tobytes() == wanted:
                for _ in range(place + 1):
                    self._waiting.popleft()
                self.reports = True
                return minibatch
        raise DataError(
            f"update: got {len(indices)} indices ({indices[:5].tolist()}…) of no minibatch that waits; wanted the "
            "whole index of a minibatch as the DataLoader delivered it, once per minibatch and in their order"
        )

    def consume_to(self, step: int) -> None:
        """Count all minibatches up to ``step`` as consumed."""
        self.reports = True
        while self._waiting and self._waiting[0].step <= step:
            self._waiting.popleft()

    @property
    def pending(self) -> list[Minibatch]:
        """What was handed out and is not consumed, oldest first."""
        return list(self._waiting) if self.reports else []

    def take_back(self) -> list[Minibatch]:
        """Remove and return ``pending``."""
        pending = self.pending
        self._waiting.clear()
        return pending
