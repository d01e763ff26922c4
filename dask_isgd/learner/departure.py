"""Announces that a learner leaves as soon as its worker does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Self

logger = logging.getLogger(__name__)

GRACE = 35.0
"""Slightly more seconds than a worker that retires or closes leaves to its tasks."""
_POLL = 0.05


class DepartureWatcher:
    """Announces that a learner leaves as soon as its worker does, even in the middle of a long step.

    Dask starts the successor 0.01 s later. Without the announcement it takes over the run, and the steps
    since the last checkpoint are lost although there is time to commit them. ``is_leaving`` is called every
    50 ms; ``leaving`` is entered once the learner leaves, and exited once it has left.
    """

    def __init__(self, is_leaving: Callable[[], bool], leaving: Callable[[], AbstractContextManager[None]]) -> None:
        self._is_leaving, self._leaving = is_leaving, leaving
        self._entered = ExitStack()
        self._announced = False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> Self:
        """Start the thread that watches."""
        self._thread = threading.Thread(target=self._watch, name="isgd-departure", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(_POLL) and not self._announced:
            self.check()

    def check(self) -> None:
        """Announce the departure if the worker leaves."""
        try:
            if self._is_leaving():
                self.announce()
        except Exception:  # such as a full disk; then the successor does not wait
            logger.exception("the departure of this learner cannot be announced")
            self._over.set()

    def announce(self) -> None:
        """Announce the departure, once."""
        with self._lock:
            if not self._announced:
                self._announced = True
                self._entered.enter_context(self._leaving())

    def close(self) -> None:
        """Announce that the learner has left if it had announced its departure, and end the thread."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(GRACE)
        self._entered.close()
