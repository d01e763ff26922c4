"""Publish and subscribe: the events between the tasks of a run.

Dask's ``Pub`` and ``Sub`` classes were removed in distributed 2025.4.0; its topics are its publish/subscribe
interface today. A topic carries small announcements. Events are hints; the truth about the parameters is in
one Dask ``Variable`` (``runtime/parameters``).
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

from distributed import Client, Worker

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.events import Event, parse

_fans: weakref.WeakKeyDictionary[Client, dict[str, _Fan]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_ECHO, _ECHO_AGAIN = 30.0, 0.1


class _Fan:
    """Dask keeps one handler a topic and client; several tasks of one process share a client."""

    def __init__(self) -> None:
        self.queues: list[queue.SimpleQueue[Any]] = []

    def __call__(self, event: tuple[float, Any]) -> None:
        for each in list(self.queues):  # on the event loop: nothing but a put
            each.put(event[1])


class Subscription:
    """The events of one topic in order, without duplicates, the scheduler's backlog first."""

    def __init__(self, client: Client, topic: str) -> None:
        self._client, self._topic = client, topic
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._seen: dict[str, int] = {}
        with _lock:
            fans = _fans.setdefault(client, {})
            if topic not in fans:
                fans[topic] = _Fan()
                client.subscribe_topic(topic, fans[topic])
            fans[topic].queues.append(self._queue)
        self._await_echo()
        self._backlog: list[Event] = []
        for _, message in client.get_events(topic) or ():
            event = self._fresh(message)
            if event is not None:
                self._backlog.append(event)

    def _await_echo(self) -> None:
        """Wait until the scheduler has us on its list: it is told so on another way than it is asked for its backlog.

        All that came before the echo is in the backlog, all that comes after it is heard. A first
        call may overtake the subscription and get no answer, so it is repeated.
        """
        token, deadline = uuid.uuid4().hex, time.monotonic() + _ECHO
        while time.monotonic() < deadline:
            self._client.log_event(self._topic, {"kind": "echo", "token": token})
            again = time.monotonic() + _ECHO_AGAIN
            while (left := again - time.monotonic()) > 0:
                try:
                    message = self._queue.get(timeout=left)
                except queue.Empty:
                    break
                if isinstance(message, dict) and message.get("token") == token:
                    return
        raise WaitTimeoutError(f"{self._topic}: the scheduler was not heard within {_ECHO:g} s; is it there?")

    def _fresh(self, message: Any) -> Event | None:
        event = parse(message)
        if event is None:
            return None
        sender, number = str(message.get("sender")), int(message.get("number", 0))
        if number <= self._seen.get(sender, 0):
            return None
        self._seen[sender] = number
        return event

    def get(self, timeout: float) -> Event | None:
        """The next event, or None after ``timeout`` seconds or when woken."""
        if self._backlog:
            return self._backlog.pop(0)
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if message is None:
                return None
            event = self._fresh(message)
            if event is not None:
                return event

    def wake(self) -> None:
        """Let the call of `get` that waits now, or the next one, return at once; from any thread."""
        self._queue.put(None)

    def drain(self) -> Iterator[Event]:
        """The events that are here now."""
        while self._backlog or not self._queue.empty():
            if (event := self.get(0)) is not None:
                yield event

    def catch_up(self) -> None:
        """Look at what the scheduler remembers: an event may have been lost on its way here."""
        for _, message in self._client.get_events(self._topic) or ():
            self._queue.put(message)

    def close(self) -> None:
        """Hear no more; the last to close unsubscribes the client."""
        with _lock:
            fans = _fans.get(self._client, {})
            fan = fans.get(self._topic)
            if fan is None or self._queue not in fan.queues:
                return
            fan.queues.remove(self._queue)
            if not fan.queues:
                del fans[self._topic]
                if self._client.status == "running":
                    self._client.unsubscribe_topic(self._topic)


def subscribe(client: Client, topic: str) -> Subscription:
    """Hear the events of ``topic``, those the scheduler still remembers first."""
    return Subscription(client, topic)


def announce(speaker: Client | Worker, topic: str, event: Event) -> None:
    """Say an event on a topic; returns at once from a worker, after 1–4 ms from a client.

    From a worker that has lost its scheduler nothing is said, and nothing raised: events are hints.
    """
    try:
        speaker.log_event(topic, event.record())
    except (OSError, RuntimeError):
        if not isinstance(speaker, Worker):
            raise
