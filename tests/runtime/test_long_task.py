"""How a long task ends, whatever ends it; what was opened is closed in reverse order."""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext

import pytest
from distributed import Reschedule
from fake_worker import FakeWorker

from dask_isgd.errors import CheckpointError, LeaseLostError, RunNotFoundError, StorageFullError, WaitTimeoutError
from dask_isgd.events import Ended
from dask_isgd.runtime import long_task
from dask_isgd.runtime.long_task import LongTask, Parts
from dask_isgd.storage.run.leases import Leases


class Part:
    def __init__(self, name: str, log: list[str], opens: Exception | None = None, closes: Exception | None = None):
        self.name, self.log, self.opens, self.closes = name, log, opens, closes

    def open(self) -> None:
        if self.opens is not None:
            raise self.opens
        self.log.append(f"open {self.name}")

    def close(self) -> None:
        self.log.append(f"close {self.name}")
        if self.closes is not None:
            raise self.closes


class Task(LongTask):
    """Ends as ``works`` tells: an outcome, or an error."""

    last_step = 20
    leases: Leases

    def __init__(self, works: str | Exception, *, leaves: Exception | None = None, **second) -> None:
        super().__init__(FakeWorker(), None, "key")
        self.works, self.leaves, self.second, self.log = works, leaves, second, []

    def open(self, parts: Parts) -> None:
        self.announcer = self.worker.announcer()
        self.lease = self.leases.acquire({})
        parts.open(Part("first", self.log))
        parts.open(Part("second", self.log, **self.second))
        parts.add(Part("third", self.log))

    def work(self) -> str:
        if isinstance(self.works, Exception):
            raise self.works
        return self.works

    def leave(self) -> str:
        self.log.append("leave")
        if self.leaves is not None:
            raise self.leaves
        return "left"

    def finish(self, outcome: str) -> None:
        self.log.append(f"finish {outcome}")


@pytest.fixture(autouse=True)
def leases(tmp_path, monkeypatch):
    monkeypatch.setattr(Task, "leases", Leases(tmp_path / "run" / "leases"), raising=False)
    return Task.leases


LOST = LeaseLostError("incarnation 1 is fenced")


@pytest.mark.parametrize(
    ("works", "status", "leaves", "outcome", "message"),
    [
        ("finished", "wanted", None, "finished", ""),
        ("stopped", "cancelled", None, "stopped", ""),
        (LOST, "wanted", None, "fenced", "incarnation 1 is fenced"),
        (LOST, "leaving", None, "fenced", "incarnation 1 is fenced"),
        # whatever breaks while the cluster goes away
        (OSError("no route"), "leaving", None, "left", ""),
        (WaitTimeoutError("late"), "cancelled", None, "left", ""),
        (RuntimeError("closed"), "leaving", LOST, "fenced", "incarnation 1 is fenced"),
        # and what breaks by itself
        (OSError("no route"), "wanted", None, "failed", "OSError: no route"),
        (StorageFullError("full"), "leaving", None, "failed", "StorageFullError: full"),
        (RuntimeError("closed"), "leaving", StorageFullError("full"), "failed", "StorageFullError: full"),
    ],
)
def test_outcomes(monkeypatch, works, status, leaves, outcome, message):
    monkeypatch.setattr(long_task, "task_status", lambda worker, key: status)
    task = Task(works, leaves=leaves)
    error = leaves or works
    with pytest.raises(type(error), match=str(error)) if outcome == "failed" else nullcontext():
        assert task.run() == outcome
    ended = Ended(run="r", incarnation=2, attempt=7, role="learner", outcome=outcome, step=20, message=message)
    assert task.worker.events == [ended]
    assert [entry for entry in task.log if entry != "leave"] == [
        *("open first", "open second", f"finish {outcome}", "close third", "close second", "close first"),
    ]


@pytest.mark.parametrize("error", [CheckpointError("cannot be written"), OSError("no such file"), KeyError("chunk")])
def test_a_deleted_run_explains_whatever_fails_then(monkeypatch, tmp_path, error):
    monkeypatch.setattr(long_task, "task_status", lambda worker, key: "wanted")
    task = Task("finished")

    def work():
        shutil.rmtree(tmp_path / "run")
        raise error

    task.work = work
    with pytest.raises(RunNotFoundError, match=r"run was deleted, moved or replaced") as raised:
        task.run()
    assert raised.value.__context__ is error
    assert task.worker.events[-1].message.startswith("RunNotFoundError: the run directory")


def test_a_successor_explains_whatever_fails_then(monkeypatch, leases):
    monkeypatch.setattr(long_task, "task_status", lambda worker, key: "wanted")
    task = Task(OSError("no such file"))
    task.finish = lambda outcome: None
    work = task.work
    task.work = lambda: leases.acquire({}) and work()
    assert task.run() == "fenced"


def test_what_was_opened_before_a_failure_is_closed():
    task = Task("finished", opens=StorageFullError("full"))
    with pytest.raises(StorageFullError, match="full"):
        task.run()
    assert task.log == ["open first", "close first"]
    assert task.worker.events == []


def test_a_part_that_cannot_be_closed_does_not_keep_the_others_open(monkeypatch, caplog):
    monkeypatch.setattr(long_task, "task_status", lambda worker, key: "wanted")
    task = Task("finished", closes=OSError("no route"))
    with caplog.at_level(logging.ERROR):
        assert task.run() == "finished"
    assert task.log[-3:] == ["close third", "close second", "close first"]
    assert "Part could not be closed" in caplog.text


@pytest.mark.parametrize(("closes", "logged"), [("full", ""), ("quota", "Part could not be closed: quota\n")])
def test_an_error_with_which_the_task_ends_anyway_is_not_logged_again(monkeypatch, caplog, closes, logged):
    monkeypatch.setattr(long_task, "task_status", lambda worker, key: "wanted")
    with pytest.raises(StorageFullError, match="full"):
        Task(StorageFullError("full"), closes=StorageFullError(closes)).run()
    assert "".join(f"{record.getMessage()}\n" for record in caplog.records) == logged
    assert not any(record.exc_info for record in caplog.records)


def test_a_task_that_leaves_with_its_worker_has_no_result_and_is_scheduled_again():
    with pytest.raises(Reschedule):
        Task("left").run_or_reschedule()
    assert Task("stopped").run_or_reschedule() == "stopped"
