"""The draws of rank 0, from which the feed of each rank takes its share."""

from __future__ import annotations

from threading import Condition
from typing import NamedTuple

import numpy as np

from dask_isgd.errors import DataError, WaitTimeoutError
from dask_isgd.learner.shares import share_of
from dask_isgd.learner.trainer import Whole
from dask_isgd.sampling import Draw
from dask_isgd.sampling.draws import Floats, Integers


class Drawn(NamedTuple):
    """A global minibatch of M examples, without the probabilities, which only rank 0 needs."""

    indices: Integers
    """(M,)"""
    coefficients: Floats
    """(M,)"""


class SharedDraws:
    """Global minibatches of ``size`` examples by step; a feed draws the share of ``rank`` out of ``count``.

    What was drawn is never dropped, as ranks would have to agree on when; it keeps its coefficients.
    """

    gate_step = -1

    def __init__(self, size: int, rank: int, count: int, timeout: float) -> None:
        self.share = share_of(size, rank, count)
        self._size, self._timeout = size, timeout
        self._drawn: dict[int, Drawn] = {}
        self._changed, self._closed = Condition(), False

    def put(self, step: int, drawn: Drawn) -> None:
        """Add the global minibatch of a step."""
        with self._changed:
            self._drawn[step] = drawn
            self._changed.notify_all()

    def forget(self, step: int) -> None:
        """Drop the minibatches before ``step``."""
        with self._changed:
            self._drawn = {s: drawn for s, drawn in self._drawn.items() if s >= step}

    def whole(self, step: int) -> Whole:
        """Describe the global minibatch of a step."""
        return Whole(self._size, float(self._drawn[step].coefficients.max()))

    def draw(self, step: int, attempt: int = 0) -> Draw:
        """Return this rank's share of the minibatch of a step; wait for it if it has not arrived."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: step in self._drawn or self._closed, self._timeout)
            if not arrived or self._closed:
                raise WaitTimeoutError(f"step {step}: rank 0 drew no minibatch within {self._timeout:g} s")
            drawn = self._drawn[step]
        indices, coefficients = drawn.indices[self.share], drawn.coefficients[self.share]
        return Draw(indices, coefficients, np.full(len(indices), np.nan))

    def unreadable(self, error: DataError) -> None:
        """Raise ``error``: a group leaves out no chunk."""
        raise error

    def close(self) -> None:
        """End all waits with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
