"""What a client knows of a run: status and latest values, from events, futures and the run directory."""

from __future__ import annotations

import contextlib
import itertools
import math
import time

import dask
import pytest
from distributed import Client, LocalCluster

from dask_isgd.checks.monitor import RunMonitor, _as_raised
from dask_isgd.errors import IsgdError, LeaseLostError, NoLearnerWorkerError, StorageFullError, WaitTimeoutError
from dask_isgd.events import Control, Ended, Event, Fault, Progress, Published, topic_of
from dask_isgd.runtime import pubsub
from dask_isgd.storage import RunDirectory

LOCAL = {"processes": False, "protocol": "tcp://", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
NAMES = (f"r{number}" for number in itertools.count())


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ("StorageFullError: cannot write /a: no space", StorageFullError, "cannot write /a: no space"),
        ("StorageFullError('cannot write /a: no space')", StorageFullError, "cannot write /a: no space"),
        ("StorageFullError('cannot write /a: cut o", StorageFullError, "cannot write /a: cut o"),
        ("ValueError('x')", IsgdError, "the learner failed at step 7: ValueError('x')"),
    ],
)
def test_an_error_that_an_event_reports_is_raised_as_its_own_class(message, kind, text):
    ended = Ended(run="r", incarnation=1, attempt=1, role="learner", outcome="failed", step=7, message=message)
    error = _as_raised("r", ended)
    assert type(error) is kind
    assert text in str(error)


@pytest.fixture(scope="module")
def client():
    """A client of a scheduler and one worker in this process."""
    with LocalCluster(n_workers=1, threads_per_worker=2, **LOCAL) as cluster, Client(cluster) as client:
        yield client


class Watched:
    """A monitor, and the events of its run."""

    def __init__(self, client: Client, tmp_path) -> None:
        self.client, self.run = client, next(NAMES)
        self.directory = RunDirectory(tmp_path / "run")
        self.monitor = self.another()

    def another(self) -> RunMonitor:
        return RunMonitor(self.client, self.directory, self.run, 100)

    def send(self, *events: Event) -> None:
        for event in events:
            pubsub.announce(self.client, topic_of(self.run), event)
        self.client.get_events(topic_of(self.run))  # the scheduler has them

    def published(self, version: int, incarnation: int = 1) -> Published:
        return Published(run=self.run, incarnation=incarnation, version=version, address="a", checkpoint=None)

    def progress(self, step: int, incarnation: int = 1) -> Progress:
        values = {"loss": 0.5}
        return Progress(run=self.run, incarnation=incarnation, step=step, address="a", open=True, values=values)

    def ended(self, role: str, outcome: str, incarnation: int = 1, message: str = "") -> Ended:
        return Ended(
            run=self.run, incarnation=incarnation, attempt=1, role=role, outcome=outcome, step=9, message=message
        )

    def wants(self, want: str) -> Control:
        return Control(run=self.run, incarnation=0, attempt=1, want=want)


@pytest.fixture
def watched(client, tmp_path):
    return Watched(client, tmp_path)


def settled(watched: Watched, events: list[Event]) -> RunMonitor:
    """A monitor that has received all of the events: it subscribes after them."""
    watched.send(*events)
    return watched.another()


CASES = [
    ("nothing yet", lambda w: [], "starting"),
    ("alive, nothing published", lambda w: [w.progress(5)], "starting"),
    ("published", lambda w: [w.published(0)], "running"),
    ("paused", lambda w: [w.published(0), w.wants("pause")], "paused"),
    ("unpaused", lambda w: [w.published(0), w.wants("pause"), w.wants("run")], "running"),
    ("finished", lambda w: [w.published(0), w.ended("learner", "finished")], "finished"),
    ("only the coordinator has ended", lambda w: [w.published(0), w.ended("coordinator", "finished")], "running"),
    ("its worker left", lambda w: [w.published(0), w.ended("learner", "left")], "running"),
    ("resumed", lambda w: [w.published(0), w.ended("learner", "stopped"), w.published(9, 2)], "running"),
]


@pytest.mark.parametrize(("events", "status"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_status_from_events(watched, events, status):
    assert settled(watched, events(watched)).status == status


def test_latest_values_are_a_copy(watched):
    monitor = settled(watched, [watched.published(0), watched.progress(5)])
    monitor.latest["step"] = 7
    latest = monitor.latest
    assert {name: latest[name] for name in ("step", "steps", "loss", "gate")} == {
        "step": 5,
        "steps": 100,
        "loss": 0.5,
        "gate": True,
    }


def test_forget_drops_the_events_of_earlier_starts(watched):
    monitor = settled(watched, [watched.published(0), watched.ended("learner", "failed")])
    monitor.forget()
    assert (monitor.status, monitor.latest["step"]) == ("starting", 0)


@pytest.mark.parametrize(
    ("finished", "status"), [(None, "stopped"), (False, "stopped"), (True, "finished")], ids=["none", "early", "last"]
)
def test_a_silent_run_without_a_task_has_the_status_of_its_directory(watched, monkeypatch, finished, status):
    monkeypatch.setattr("dask_isgd.checks.monitor._SILENCE", 0.0)
    if finished is not None:
        watched.directory.create({"run": watched.run})
        watched.directory.checkpoints().commit(9, 1, {}, {"finished": finished})
    assert watched.another().status == status


def test_a_silent_learner_that_waits_for_a_worker_is_not_gone(watched, monkeypatch):
    monkeypatch.setattr("dask_isgd.checks.monitor._SILENCE", 0.0)
    waits = Fault(run=watched.run, incarnation=0, what="learner waits", detail="no worker can take it")
    assert settled(watched, [watched.published(0), waits]).status == "running"


class TestFutures:
    def owner(self, watched: Watched, learner, coordinator) -> RunMonitor:
        futures = [watched.client.submit(function, pure=False) for function in (learner, coordinator)]
        watched.monitor.own(*futures)
        return watched.monitor

    def test_results_are_kept_and_the_tasks_released(self, watched):
        monitor = self.owner(watched, lambda: {"outcome": "finished"}, dict)
        monitor.wait(time.monotonic() + 30, None)
        assert monitor.status == "finished"
        assert monitor.owned == []

    @pytest.mark.parametrize("outcome", ["left", "fenced", "superseded"])
    def test_a_learner_that_was_replaced_by_nobody_has_stopped(self, watched, outcome):
        monitor = self.owner(watched, lambda: {"outcome": outcome}, dict)
        expected = contextlib.nullcontext() if outcome == "left" else pytest.raises(LeaseLostError, match="taken over")
        with expected:
            monitor.wait(time.monotonic() + 30, None)
        assert monitor.status == "stopped"

    @pytest.mark.parametrize("which", ["learner", "coordinator"])
    def test_an_error_of_a_task_is_raised_and_the_run_has_failed(self, watched, which):
        def fails() -> None:
            raise StorageFullError("no space")

        functions = {"learner": lambda: {"outcome": "finished"}, "coordinator": dict} | {which: fails}
        monitor = self.owner(watched, **functions)
        with pytest.raises(StorageFullError, match="no space"):
            monitor.wait(time.monotonic() + 30, None)
        assert monitor.status == "failed"


class TestWaiting:
    def test_without_futures_until_both_tasks_have_ended(self, watched):
        ends = [watched.ended("learner", "finished"), watched.ended("coordinator", "finished")]
        monitor = settled(watched, [watched.published(9), *ends])
        monitor.wait(time.monotonic() + 30, None)
        assert monitor.latest["step"] == 9
        monitor.conclude({"loss": 0.5})
        assert (monitor.latest["step"], monitor.latest["loss"]) == (9, 0.5)

    @pytest.mark.parametrize("role", ["learner", "coordinator"])
    def test_an_error_that_an_event_reports_is_raised(self, watched, role):
        ends = [watched.ended(r, "failed", message="StorageFullError: full") for r in ("learner", "coordinator")]
        ends = [end if end.role == role else watched.ended(end.role, "finished") for end in ends]
        with pytest.raises(StorageFullError, match="full"):
            settled(watched, ends).wait(time.monotonic() + 30, None)

    def test_a_deadline_leaves_the_run_alone(self, watched):
        monitor = settled(watched, [watched.published(0)])
        with pytest.raises(WaitTimeoutError, match="timed out waiting for the run; the run is running and continues"):
            monitor.wait(time.monotonic() + 0.3, None)

    def test_a_run_that_has_ended_does_not_continue(self, watched):
        monitor = settled(watched, [watched.ended("learner", "stopped")])
        assert monitor.status == "stopped"
        with pytest.raises(WaitTimeoutError, match="the coordinator's end; the run is stopped but its tasks have not"):
            monitor.wait_for_coordinator(time.monotonic() + 0.3)

    def test_every_new_event_is_followed(self, watched):
        monitor = settled(watched, [watched.published(0)])
        steps = []
        for latest in monitor.follow(math.inf):
            if steps[-1:] != [latest["step"]]:
                steps.append(latest["step"])
                following = (
                    watched.progress(latest["step"] + 1) if len(steps) < 4 else watched.ended("learner", "stopped")
                )
                watched.send(following)
        assert steps == [0, 1, 2, 3]

    def test_a_silent_learner_that_no_worker_can_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dask_isgd.checks.monitor._SILENCE", 0.1)
        with (
            dask.config.set({"isgd.cluster.timeout": "0.5s"}),
            LocalCluster(n_workers=0, **LOCAL) as cluster,
            Client(cluster) as client,
        ):
            watched = Watched(client, tmp_path)
            waits = Fault(run=watched.run, incarnation=0, what="learner waits", detail="no worker can take it")
            monitor = settled(watched, [watched.published(0), waits])
            with pytest.raises(NoLearnerWorkerError, match=r"silent for 1 s and none of the 0 workers can run it"):
                monitor.wait(time.monotonic() + 30, None)
