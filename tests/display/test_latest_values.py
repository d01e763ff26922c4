"""Events in, latest values out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dask_isgd.display.latest_values import LatestValues
from dask_isgd.events import Control, Ended, Evaluated, Event, Fault, Heartbeat, Progress, Published, Scored


def progress(step: int, incarnation: int = 1, **values: float) -> Progress:
    return Progress(run="r", incarnation=incarnation, step=step, address="a", open=True, values=values)


def published(version: int, incarnation: int = 1) -> Published:
    return Published(run="r", incarnation=incarnation, version=version, address="tcp://a", checkpoint=f"at-{version}")


def heartbeat(role: str, incarnation: int) -> Heartbeat:
    return Heartbeat(run="r", incarnation=incarnation, role=role, address="a")


def ended(role: str, outcome: str, incarnation: int = 1) -> Ended:
    return Ended(run="r", incarnation=incarnation, attempt=1, role=role, outcome=outcome, step=9)


def fault(what: str) -> Fault:
    return Fault(run="r", incarnation=0, what=what, detail="d")


SCORED = Scored(run="r", incarnation=1, chunks=[[0, 1, 10], [1, 1, 20]], examples=64, per_second=9.0)


def fold(*events: Event, **initial: object) -> LatestValues:
    latest = LatestValues(**initial)
    for event in events:
        latest.apply(event)
    return latest


PUBLISHED = {"incarnation": 1, "step": 7, "version": 7, "checkpoint": "at-7", "learner": "tcp://a"}


@pytest.mark.parametrize(
    ("events", "values"),
    [
        ([], {}),
        ([progress(5, loss=0.5)], {"incarnation": 1, "step": 5, "gate": True, "loss": 0.5}),
        ([published(7)], PUBLISHED),
        ([published(7), published(9)], PUBLISHED | {"version": 9, "checkpoint": "at-9"}),
        ([heartbeat("learner", 3)], {}),
        ([heartbeat("coordinator", 3)], {}),
        ([SCORED], {"examples_scored": 64, "scored_per_second": 9.0, "scored_version": 20}),
        (
            [Evaluated(run="r", incarnation=1, version=8, loss=0.3, error=0.1)],
            {"validation_error": 0.1, "validation_loss": 0.3, "evaluated": 8},
        ),
        ([Control(run="r", incarnation=0, attempt=1, want="pause")], {"want": "pause"}),
        ([fault("x"), fault("y")], {"faults": 2, "fault": "y: d"}),
        ([ended("learner", "finished")], {}),
    ],
)
def test_each_event_updates_its_values(events, values):
    assert fold(*events).values == values


def test_initial_values_stay_until_an_event_changes_them():
    assert fold(progress(5), step=0, steps=10).values == {"step": 5, "steps": 10, "incarnation": 1, "gate": True}
    assert fold(step=0, steps=10).values == {"step": 0, "steps": 10}


@pytest.mark.parametrize(
    ("events", "incarnation", "step"),
    [
        ([progress(500), heartbeat("learner", 2), published(50, 2)], 2, 50),
        ([progress(50), published(40, 2)], 2, 40),  # a successor resumes from a checkpoint
        ([progress(50), progress(45, 2)], 2, 45),
        ([progress(50), published(40, 2), progress(44, 2), published(48, 2)], 2, 44),
        ([progress(45, 2), progress(60)], 2, 45),  # the older learner is not dead yet
        ([progress(45, 2), published(60)], 2, 45),
        ([progress(45, 2), heartbeat("learner", 1)], 2, 45),
        ([progress(45, 2), heartbeat("coordinator", 1)], 2, 45),
    ],
)
def test_a_successor_replaces_a_learner(events, incarnation, step):
    latest = fold(*events)
    assert (latest.incarnation, latest.values["step"]) == (incarnation, step)


@pytest.mark.parametrize(
    ("events", "outcomes"),
    [
        ([ended("learner", "finished")], {"learner": "finished"}),
        ([ended("learner", "left")], {}),  # it has a successor
        ([ended("learner", "fenced")], {}),
        ([ended("learner", "failed"), ended("learner", "stopped")], {"learner": "failed"}),  # the first one counts
        ([ended("learner", "stopped"), published(9)], {"learner": "stopped"}),  # its last publication, late
        ([ended("learner", "stopped"), published(9, 2)], {}),
        ([ended("learner", "stopped"), heartbeat("learner", 2)], {}),
        ([ended("learner", "failed", 0), progress(9)], {}),  # the scheduler, which knows no incarnation
        ([ended("learner", "stopped"), ended("coordinator", "stopped"), progress(9, 2)], {"coordinator": "stopped"}),
    ],
)
def test_which_tasks_have_ended(events, outcomes):
    assert {role: event.outcome for role, event in fold(*events).ended.items()} == outcomes


@pytest.mark.parametrize(
    ("faults", "waits"),
    [
        ([], False),
        (["learner waits"], True),
        (["coordinator waits"], False),
        (["learner waits", "coordinator starts again"], True),
        (["learner waits", "learner starts again"], False),
    ],
)
def test_whether_the_learner_waits_for_a_worker(faults, waits):
    assert fold(*map(fault, faults)).learner_waits is waits


def test_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import dask_isgd.display.latest_values"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
