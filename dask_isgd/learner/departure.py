"""Announces that a learner leaves as soon as its worker does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Self

logger = logging.getLogger(__name__)

GRACE = 35.0
"""Slightly more seconds than a worker that retires or closes leaves to its tasks."""
_POLL = 0.05
_SIGN_EVERY = 1.0


class DepartureWatcher:
    """Announces that a learner leaves as soon as its worker does, even in the middle of a long step.

    Dask starts the successor 0.01 s later. Without the announcement it takes over the run, and the steps
    since the last checkpoint are lost although there is time to commit them. ``is_leaving`` is called every
    50 ms; ``leaving`` is entered once the learner leaves, and exited once it has left. The function that it yields
    is called every second meanwhile: a successor does not wait for a learner that is killed while it leaves.
    """

    def __init__(
        self, is_leaving: Callable[[], bool], leaving: Callable[[], AbstractContextManager[Callable[[], None]]]
    ) -> None:
        self._is_leaving, self._leaving = is_leaving, leaving
        self._entered = ExitStack()
        self._announced = False
        self._sign: Callable[[], None] = lambda: None
        self._signed = 0.0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> Self:
        """Start the thread that watches."""
        self._thread = threading.Thread(target=self._watch, name="isgd-departure", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(_POLL):
            self.check()

    def check(self) -> None:
        """Announce the departure if the worker leaves; once announced, give a sign of life if it is due."""
        try:
            if self._announced:
                self._give_sign()
            elif self._is_leaving():
                self.announce()
        except Exception:  # such as a full disk; then the successor does not wait
            logger.exception("the departure of this learner cannot be announced")
            self._over.set()

    def announce(self) -> None:
        """Announce the departure, once."""
        with self._lock:
            if not self._announced:
                self._sign, self._signed = self._entered.enter_context(self._leaving()), time.monotonic()
                self._announced = True

    def _give_sign(self) -> None:
        with self._lock:
            if not self._over.is_set() and time.monotonic() - self._signed >= _SIGN_EVERY:
                self._signed = time.monotonic()
                self._sign()

    def close(self) -> None:
        """Announce that the learner has left if it had announced its departure, and end the thread."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(GRACE)
        self._entered.close()
