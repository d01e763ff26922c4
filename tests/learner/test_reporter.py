"""Rows of the history: means over the steps since the last report, some of which are announced."""

from __future__ import annotations

import math
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from fake_worker import FakeWorker

from dask_isgd.columns import ANNOUNCED
from dask_isgd.learner import reporter as module
from dask_isgd.learner.reporter import COLUMNS, Reporter
from dask_isgd.learner.step import Step

OF_THE_LEARNER = {
    *("step", "seconds", "examples", "loss", "gradient_norm", "clipped", "learning_rate", "steps_per_second"),
    *("clip_bias", "mean_gradient_sq_norm", "threads", "learners"),
}
DRAWS = SimpleNamespace(
    open=True,
    gate=SimpleNamespace(probing=True, reason="measuring"),
    report=lambda step: {name: 1.23456789 for name in COLUMNS if name not in OF_THE_LEARNER},
)
"""Stands in for a batch sampler."""


class Reporting:
    """A reporter of a run of 40 steps of 8 examples, whose rows and events are kept."""

    def __init__(self, synchronous: bool = False) -> None:
        self.rows: list[tuple[dict[str, float], bool]] = []
        self.worker = FakeWorker()
        self.reporter = Reporter(self.worker.announcer(), self.keep, steps=40, batch_size=8, synchronous=synchronous)

    def keep(self, row: dict[str, float], *, write: bool) -> None:
        self.rows.append((row, write))

    def report(self, step: int, *steps: Step) -> None:
        for each in steps:
            self.reporter.add(each)
        self.reporter.report(step, DRAWS, seconds=3.0, learning_rate=0.1, threads=2)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def step(
    loss: float, gradient_norm: float = 2.0, clipped: bool = False, sq_norm: float = math.nan, bias: float = math.nan
) -> Step:
    return Step(loss, None, sq_norm, gradient_norm, clipped, bias)


def test_a_row_holds_means_over_the_steps_since_the_last_report(clock):
    reporting = Reporting()
    clock.now += 2.0
    reporting.report(4, step(1.0), step(2.0, 3.0, clipped=True), step(3.0, 5.0), step(6.0, 6.0, sq_norm=0.25, bias=0.1))
    clock.now += 1.0
    reporting.report(5, step(7.0))
    (first, _), (second, _) = reporting.rows
    assert tuple(first) == COLUMNS
    wanted = {
        "step": 4,
        "seconds": 3.0,
        "examples": 32,
        "loss": 3.0,
        "gradient_norm": 4.0,
        "clipped": 0.25,
        "clip_bias": 0.1,
        "learning_rate": 0.1,
        "steps_per_second": 2.0,
        "mean_gradient_sq_norm": 0.25,
        "threads": 2,
        "learners": 1,
    }
    assert {name: first[name] for name in wanted} == wanted
    assert [second[name] for name in ("loss", "gradient_norm", "clipped", "steps_per_second")] == [7.0, 2.0, 0.0, 1.0]
    assert np.isnan(second["mean_gradient_sq_norm"])


def test_rows_are_announced_twice_per_second_and_at_the_end(clock):
    reporting = Reporting()
    for at, number in [(0.1, 10), (0.5, 20), (0.9, 30), (0.95, 40)]:
        clock.now = 100.0 + at
        reporting.report(number, step(1.0))
    assert [write for _, write in reporting.rows] == [False, True, False, True]
    assert [event.step for event in reporting.worker.events] == [20, 40]


@pytest.mark.parametrize("synchronous", [False, True])
def test_an_event_is_small_and_tells_the_state_of_the_gate(clock, synchronous):
    reporting = Reporting(synchronous)
    reporting.report(40, step(1 / 3))
    (event,) = reporting.worker.events
    assert (event.open, event.probing, event.why) == (True, not synchronous, "measuring")
    assert tuple(event.values) == ANNOUNCED
    assert event.values["loss"] == 0.333333
    assert len(msgpack.dumps(reporting.worker.messages[0][1])) < 1024
