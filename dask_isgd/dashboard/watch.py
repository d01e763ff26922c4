"""The scheduler's own ear for runs: fills the records that pages and metrics read."""

from __future__ import annotations

import time
import weakref
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from dask_isgd.dashboard.record import RunRecord
from dask_isgd.events import parse, topic_of

_MOST_RUNS = 32
_watches: weakref.WeakKeyDictionary[Scheduler, RunWatcher] = weakref.WeakKeyDictionary()


class RunWatcher(SchedulerPlugin):
    """Records of the runs of one scheduler, the newest 32; everything on the scheduler's event loop."""

    name = "isgd-watch"

    def __init__(self) -> None:
        self.runs: dict[str, RunRecord] = {}
        self.added = False
        """Whether the pages were added to a dashboard that ran already."""

    def log_event(self, topic: str, msg: Any) -> None:
        if topic.startswith("isgd-"):
            self.hear(topic, msg, time.time())

    def hear(self, topic: str, message: Any, at: float) -> None:
        """Take one message of a topic; what is no event of the topic's run is ignored."""
        event = parse(message)
        if event is None or topic != topic_of(event.run):
            return
        record = self.runs.get(event.run)
        if record is None:
            if len(self.runs) >= _MOST_RUNS:
                del self.runs[min(self.runs, key=lambda run: self.runs[run].updated)]
            record = self.runs[event.run] = RunRecord(event.run)
        record.apply(event, at)

    def newest(self) -> list[RunRecord]:
        """All records, the one heard of last first."""
        return sorted(self.runs.values(), key=lambda record: -record.updated)


def watch(scheduler: Scheduler) -> RunWatcher:
    """The scheduler's watch; the first call starts it with what the scheduler remembers of every run."""
    found = _watches.get(scheduler)
    if found is None:
        found = _watches[scheduler] = RunWatcher()
        for topic, events in scheduler.get_events().items():
            if topic.startswith("isgd-"):
                for at, message in events:
                    found.hear(topic, message, at)
        scheduler.add_plugin(found, name=RunWatcher.name)
    return found


def watches() -> list[RunWatcher]:
    """The watches of all schedulers in this process."""
    return list(_watches.values())
