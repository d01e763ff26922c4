"""A plugin of the scheduler that receives the events of all runs and fills the records that pages and metrics read."""

from __future__ import annotations

import time
import weakref
from typing import Any

from distributed import Scheduler, SchedulerPlugin

from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.events import parse, topic_of

_MAX_RUNS = 32
_watchers: weakref.WeakKeyDictionary[Scheduler, RunWatcher] = weakref.WeakKeyDictionary()


class RunWatcher(SchedulerPlugin):
    """The records of one scheduler's latest 32 runs; used on the scheduler's event loop only."""

    name = "isgd-run-watcher"

    def __init__(self) -> None:
        self.runs: dict[str, RunRecord] = {}
        self.pages_added = False
        """Whether the pages were added to a dashboard that was already running."""

    def log_event(self, topic: str, msg: Any) -> None:
        if topic.startswith("isgd-"):
            self.receive(topic, msg, time.time())

    def receive(self, topic: str, message: Any, at: float) -> None:
        """Apply one message of a topic; anything but an event of the topic's run is ignored."""
        event = parse(message)
        if event is None or topic != topic_of(event.run):
            return
        record = self.runs.get(event.run)
        if record is None:
            if len(self.runs) >= _MAX_RUNS:
                del self.runs[min(self.runs, key=lambda run: self.runs[run].updated)]
            record = self.runs[event.run] = RunRecord(event.run)
        record.apply(event, at)

    def latest_first(self) -> list[RunRecord]:
        """Return all records, the most recently updated first."""
        return sorted(self.runs.values(), key=lambda record: -record.updated)


def watch(scheduler: Scheduler) -> RunWatcher:
    """Return the scheduler's watcher; the first call adds it, with what the scheduler remembers of every run."""
    watcher = _watchers.get(scheduler)
    if watcher is None:
        watcher = _watchers[scheduler] = RunWatcher()
        for topic, events in scheduler.get_events().items():
            if topic.startswith("isgd-"):
                for at, message in events:
                    watcher.receive(topic, message, at)
        scheduler.add_plugin(watcher, name=RunWatcher.name)
    return watcher


def watchers() -> list[RunWatcher]:
    """Return the watchers of all schedulers in this process."""
    return list(_watchers.values())
