"""A worker that keeps what it is asked to log."""

from __future__ import annotations

from typing import Any

from dask_isgd.events import Event, parse
from dask_isgd.runtime.announcer import Announcer


class FakeWorker:
    """Stands in for a Dask worker where only its events matter."""

    address = "tcp://worker:1"

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []

    def log_event(self, topic: str, message: dict[str, Any]) -> None:
        self.messages.append((topic, message))

    @property
    def events(self) -> list[Event]:
        found = [parse(message) for _, message in self.messages]
        assert None not in found
        return found

    def announcer(self, role: str = "learner", **options: Any) -> Announcer:
        return Announcer(self, "r", role, 7, 2, **options)
