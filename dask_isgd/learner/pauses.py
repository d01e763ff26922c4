"""Pauses after what the learner does beside its loop, so that this takes a small share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST = 10.0
"""Seconds of a pause, at most."""


class Pauses:
    """Limits what is done now and then to a ``share`` of the time, by a pause of at most 10 s after each time.

    Of two times in a row the shorter one counts: what takes long once was kept waiting, by a scheduler or a store.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._factor, self._clock = 1.0 / share - 1.0, clock
        self._until, self._former = -math.inf, math.inf

    @property
    def over(self) -> bool:
        """Whether the latest pause is over."""
        return self._clock() >= self._until

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time what is done inside; the pause begins with its end."""
        began = self._clock()
        yield
        ended = self._clock()
        seconds = min(ended - began, self._former)
        self._until, self._former = ended + min(self._factor * seconds, _LONGEST), ended - began
