"""Publish and subscribe: the events between the tasks of a run.

Dask's ``Pub`` and ``Sub`` classes were removed in distributed 2025.4.0; its topics are its publish/subscribe
interface today. A topic carries small announcements. Events are hints; the truth about the parameters is in
one Dask ``Variable`` (``runtime/parameters``).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from typing import Any, Protocol, Self

from distributed import Client, Worker

from dask_isgd.errors import WaitTimeoutError
from dask_isgd.events import Event, parse

_handlers: weakref.WeakKeyDictionary[Client, dict[str, _Handler]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
MOST_WAITING = 10_000
"""Events that wait for one subscriber at most; older ones are dropped, as nobody has looked for most of an hour."""
_ECHO_TIMEOUT = 30.0
_ECHO_FIRST, _ECHO_LONGEST = 0.005, 0.2
"""Seconds until the first repetition; each waits twice as long as the one before, up to the longest."""


class Sender(Protocol):
    """What sends events: a worker, or the sender of a client."""

    @property
    def address(self) -> str: ...

    def log_event(self, topic: str, msg: Any) -> Any: ...


class _Handler:
    """Dask keeps one handler per topic and client; several tasks of one process share a client."""

    def __init__(self) -> None:
        self.queues: list[weakref.ref[queue.SimpleQueue[Any]]] = []
        """Weak, so that nothing is kept for a subscriber that is gone."""

    def add(self, one: queue.SimpleQueue[Any]) -> None:
        self.queues.append(weakref.ref(one, self.queues.remove))

    def __call__(self, event: tuple[float, Any]) -> None:
        for one in [ref() for ref in self.queues]:  # on the event loop: nothing but a put
            if one is not None:
                if one.qsize() >= MOST_WAITING:
                    with contextlib.suppress(queue.Empty):
                        one.get_nowait()
                one.put(event[1])


class Subscription:
    """The events of one topic in order, without duplicates, the scheduler's backlog first."""

    def __init__(self, client: Client, topic: str) -> None:
        self._client, self._topic = client, topic
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._last_numbers: dict[str, int] = {}
        self._backlog: list[Event] = []

    def open(self) -> Self:
        """Subscribe, and fetch the backlog. Raises WaitTimeoutError if the scheduler does not reply."""
        with _lock:
            handlers = _handlers.setdefault(self._client, {})
            if self._topic not in handlers:
                handlers[self._topic] = _Handler()
                self._client.subscribe_topic(self._topic, handlers[self._topic])
            handlers[self._topic].add(self._queue)
        try:
            self._await_echo()
            for _, message in self._client.get_events(self._topic) or ():
                event = self._parse_new(message)
                if event is not None:
                    self._backlog.append(event)
        except BaseException:
            self.close()
            raise
        return self

    def _await_echo(self) -> None:
        """Wait until the scheduler has registered the subscription, which overtakes or follows other requests.

        Whatever came before the echo is in the backlog, and whatever comes after it is received. The
        first event may overtake the subscription and get no echo, so it is repeated.
        """
        token, deadline, pause = uuid.uuid4().hex, time.monotonic() + _ECHO_TIMEOUT, _ECHO_FIRST
        while time.monotonic() < deadline:
            self._client.log_event(self._topic, {"kind": "echo", "token": token})
            again, pause = time.monotonic() + pause, min(2 * pause, _ECHO_LONGEST)
            while (left := again - time.monotonic()) > 0:
                try:
                    message = self._queue.get(timeout=left)
                except queue.Empty:
                    break
                if isinstance(message, dict) and message.get("token") == token:
                    return
        raise WaitTimeoutError(f"{self._topic}: no reply from the scheduler within {_ECHO_TIMEOUT:g} s; is it running?")

    def _parse_new(self, message: Any) -> Event | None:
        """Return the event of a message, or None if it is none or was received before."""
        event = parse(message)
        if event is None:
            return None
        sender, number = str(message.get("sender")), int(message.get("number", 0))
        if number <= self._last_numbers.get(sender, 0):
            return None
        self._last_numbers[sender] = number
        return event

    def get(self, timeout: float) -> Event | None:
        """Return the next event, or None after ``timeout`` seconds or when woken."""
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
            event = self._parse_new(message)
            if event is not None:
                return event

    def wake(self) -> None:
        """Let the call of `get` that waits now, or the next one, return at once; from any thread."""
        self._queue.put(None)

    def drain(self) -> Iterator[Event]:
        """Yield the events that have been received by now."""
        while self._backlog or not self._queue.empty():
            if (event := self.get(0)) is not None:
                yield event

    def catch_up(self) -> None:
        """Fetch the events that the scheduler remembers, as one may have been lost on its way here."""
        for _, message in self._client.get_events(self._topic) or ():
            self._queue.put(message)

    def close(self) -> None:
        """Receive no more events; the last subscription to close unsubscribes the client."""
        with _lock:
            handlers = _handlers.get(self._client, {})
            handler = handlers.get(self._topic)
            own = weakref.ref(self._queue)
            if handler is None or own not in handler.queues:
                return
            handler.queues.remove(own)
            if not handler.queues:
                del handlers[self._topic]
                if self._client.status == "running":
                    self._client.unsubscribe_topic(self._topic)


def subscribe(client: Client, topic: str) -> Subscription:
    """Receive the events of ``topic``, first those that the scheduler still remembers."""
    return Subscription(client, topic).open()


def announce(sender: Client | Sender, topic: str, event: Event) -> None:
    """Send an event to a topic; returns at once from a worker, after 1–4 ms from a client.

    A worker that has lost its scheduler sends nothing and raises nothing, because events are hints.
    """
    try:
        sender.log_event(topic, event.record())
    except (OSError, RuntimeError):
        if not isinstance(sender, Worker):
            raise
