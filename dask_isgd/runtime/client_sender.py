"""Sends the events of a learner outside the cluster, from a thread, as a client waits for its scheduler."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Self

from distributed import Client

logger = logging.getLogger(__name__)

_MOST_WAITING = 1000
_TICK = 1.0


class ClientSender:
    """Sends events through a ``client``, in order and without waiting; they are lost if the scheduler does not reply.

    ``on_tick`` is called about once per second, in the same thread.
    """

    address = ""
    """There is no worker."""

    def __init__(self, client: Client, timeout: float, on_tick: Callable[[], object] = lambda: None) -> None:
        self._client, self._timeout, self._on_tick = client, timeout, on_tick
        self._waiting: queue.Queue[tuple[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="isgd-events", daemon=True)

    def open(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def log_event(self, topic: str, msg: Any) -> None:
        """Send an event soon; it is dropped if too many wait."""
        try:
            self._waiting.put_nowait((topic, msg))
        except queue.Full:
            logger.debug("%s: an event is dropped, as %d wait for the scheduler", topic, _MOST_WAITING)

    def close(self) -> None:
        """Send what waits, within the timeout, and end the thread."""
        try:
            self._waiting.put(None, timeout=self._timeout)
        except queue.Full:
            return  # the scheduler does not reply; the thread ends with the process
        self._thread.join(self._timeout)

    def _work(self) -> None:
        while True:
            try:
                event = self._waiting.get(timeout=_TICK)
            except queue.Empty:
                self._on_tick()
                continue
            if event is None:
                return
            try:
                self._client.log_event(*event)
            except Exception as error:  # events are hints
                logger.debug("%s: an event was not sent: %r", event[0], error)
