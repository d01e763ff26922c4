"""Pauses after what the learner does beside its loop, so that this takes a small share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST = 10.0
"""Seconds of a pause, at most."""
_SPARING, _SHORT = 2.5, 0.5
"""Pauses are so many times as long if asked for, as long as that is no more than so many seconds."""


class Pauses:
    """Limits what is done now and then to a ``share`` of the time, by a pause of at most 10 s after each time.

    Of two times in a row the shorter one counts: what takes long once was kept waiting, by a scheduler or a store.
    ``sparing``: pauses are 2.5 times as long, as long as they are no longer than half a second.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic, *, sparing: bool = False) -> None:
        self._factor, self._clock = 1.0 / share - 1.0, clock
        self._sparing = _SPARING if sparing else 1.0
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
        pause = self._factor * seconds
        pause = min(max(pause, min(self._sparing * pause, _SHORT)), _LONGEST)
        self._until, self._former = ended + pause, ended - began
