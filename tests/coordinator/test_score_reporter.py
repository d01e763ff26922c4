"""What a coordinator reports of scored chunks: events, and stamps of which there is one writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_worker import FakeWorker
from numpy.testing import assert_array_equal

from dask_isgd.coordinator import score_reporter
from dask_isgd.coordinator.score_reporter import ScoreReporter
from dask_isgd.errors import LeaseLostError
from dask_isgd.events import Scored, WeightSummary
from dask_isgd.scorer.task import ScoreReport
from dask_isgd.storage import Leases, WeightArray

CHUNKS, SIZE, INTERVAL = 130, 4, 0.5


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


class Reporting:
    """A reporter of real weights and leases, whose events are kept."""

    def __init__(self, folder: Path) -> None:
        self.weights = WeightArray.create(folder / "weights.zarr", CHUNKS * SIZE, SIZE)
        self.leases = Leases(folder / "leases", "coordinator")
        self.worker, self.lease = FakeWorker(), self.leases.acquire({})
        self.reporter = ScoreReporter(self.weights, self.worker.announcer("coordinator"), self.lease, INTERVAL)

    def add(self, *chunks: int, version: int = 32, incarnation: int = 1) -> None:
        for chunk in chunks:
            self.weights.write(chunk, np.ones(SIZE, np.float32))
            self.reporter.add(ScoreReport(chunk, incarnation, version, SIZE, 0.1, 1.0, 0))

    def scored(self) -> list[Scored]:
        return [event for event in self.worker.events if isinstance(event, Scored)]

    def summaries(self) -> list[WeightSummary]:
        return [event for event in self.worker.events if isinstance(event, WeightSummary)]


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(score_reporter, "time", clock)
    return clock


@pytest.fixture
def reporting(tmp_path, clock) -> Reporting:
    return Reporting(tmp_path)


def test_nothing_is_reported_before_anything_is_scored(reporting):
    reporting.reporter.report(0, complete=True)
    reporting.reporter.close(0)
    assert reporting.worker.messages == []
    assert reporting.reporter.latest == (0, -1)
    assert np.isnan(reporting.reporter.orders).all()


def test_chunks_are_announced_once_per_interval_or_when_a_learner_waits(reporting, clock):
    said = []
    for seconds, chunk, complete in [
        (0.0, 0, False),
        (0.2, 1, False),
        (0.2, 2, False),
        (0.2, 3, False),
        (0.1, 4, True),
    ]:
        clock.now += seconds
        reporting.add(chunk)
        reporting.reporter.report(0, complete=complete)
        said.append([each[0] for event in reporting.scored() for each in event.chunks])
    assert said == [[0], [0], [0], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert [event.examples for event in reporting.scored()] == [SIZE, 4 * SIZE, 5 * SIZE]
    assert reporting.scored()[1].per_second == float(f"{4 * SIZE / 0.6:.6g}")


def test_an_event_names_at_most_sixty_chunks(reporting):
    reporting.add(*range(CHUNKS))
    reporting.reporter.report(0, complete=False)
    assert [len(event.chunks) for event in reporting.scored()] == [60, 60, 10]
    assert [each for event in reporting.scored() for each in event.chunks] == [[c, 1, 32] for c in range(CHUNKS)]


def test_stamps_are_written_once_per_second_and_at_the_end(reporting, clock):
    written = []
    for seconds, chunk in [(0.0, 0), (0.5, 1), (0.6, 2), (0.5, 3)]:
        clock.now += seconds
        reporting.add(chunk)
        reporting.reporter.report(0, complete=False)
        written.append(int(np.isfinite(reporting.weights.read_stamps()[:, 0]).sum()))
    assert written == [1, 1, 3, 3]
    reporting.reporter.close(0)
    assert_array_equal(reporting.weights.read_stamps()[:4], [[32, 1, 1e9 + t] for t in (100.0, 100.5, 101.1, 101.6)])


def test_a_fenced_reporter_writes_no_stamps(reporting):
    reporting.leases.acquire({})
    reporting.add(0)
    with pytest.raises(LeaseLostError, match="coordinator incarnation 1 is fenced"):
        reporting.reporter.report(0, complete=False)
    assert np.isnan(reporting.weights.read_stamps()).all()


def test_a_successor_starts_from_the_stamps(reporting):
    reporting.add(3, version=32, incarnation=1)
    reporting.add(5, version=20, incarnation=2)
    reporting.reporter.close(0)
    successor = ScoreReporter(reporting.weights, reporting.worker.announcer(), reporting.leases.acquire({}), INTERVAL)
    assert successor.latest == (2, 20)
    assert np.argsort(successor.orders)[:2].tolist() == [3, 5], "stalest first, those never scored aside"
    assert successor.examples == 0


def test_the_weights_are_summarised_every_five_seconds(reporting, clock):
    for seconds in (0.0, 4.9, 0.2):
        clock.now += seconds
        reporting.add(0)
        reporting.reporter.report(40, complete=False)
    assert [event.step for event in reporting.summaries()] == [40, 40]
    assert reporting.summaries()[0].never == CHUNKS - 1


def test_weights_that_cannot_be_read_are_not_summarised(reporting, monkeypatch, caplog):
    def unreadable(versions: object, step: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr(reporting.reporter._summarizer, "summarize", unreadable)
    reporting.add(0)
    reporting.reporter.close(0)
    assert reporting.summaries() == []
    assert len(reporting.scored()) == 1
    assert "run r: the weights cannot be summarised" in caplog.text
