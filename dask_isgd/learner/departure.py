"""Announces that a learner leaves as soon as its worker does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

logger = logging.getLogger(__name__)

_GRACE = 35.0
"""Seconds a worker that retires or closes leaves to its tasks, and a little more."""
_LOOK = 0.05


class DepartureWatcher:
    """Says that a learner leaves as soon as its worker does, be it in the middle of a long step.

    Dask starts the successor 0.01 s later. Unless it finds the word it takes the run over, and the steps
    since the last checkpoint are lost though there is time to commit them. ``leaves`` is asked every 50 ms;
    ``word`` holds while the learner leaves, and ends once it has left.
    """

    def __init__(self, leaves: Callable[[], bool], word: Callable[[], AbstractContextManager[None]]) -> None:
        self._leaves, self._word = leaves, word
        self._given = ExitStack()
        self._said = False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="isgd-lookout", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK) and not self._said:
            self.look()

    def look(self) -> None:
        """Give the word if the worker leaves."""
        try:
            if self._leaves():
                self.say()
        except Exception:  # such as a full disk; then the successor does not wait
            logger.exception("cannot say that this learner leaves")
            self._over.set()

    def say(self) -> None:
        with self._lock:
            if not self._said:
                self._said = True
                self._given.enter_context(self._word())

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(_GRACE)
        self._given.close()
