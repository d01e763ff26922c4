"""What the dashboard keeps of a run: bounded, from the first step to the last, in order after any restart."""

import numpy as np
import pytest

from dask_isgd import events
from dask_isgd.dashboard.run_record import RunRecord, Series
from dask_isgd.dashboard.run_watcher import RunWatcher

RUN = {"run": "abc", "incarnation": 1}


def progress(step, incarnation=1, **values):
    examples, seconds = values.pop("examples", step * 32.0), values.pop("seconds", step / 100)
    return events.Progress(
        run="abc",
        incarnation=incarnation,
        step=step,
        address="tcp://x",
        open=values.pop("open", True),
        values={"step": step, "examples": examples, "seconds": seconds, "loss": 1.0, **values},
    )


class TestSeries:
    @pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 100, 12_345])
    def test_is_bounded_even_and_ends_with_the_latest(self, n):
        series = Series(("step", "loss"), capacity=8)
        for step in range(n):
            series.append({"step": step, "loss": -step})
        steps = series["step"]
        assert len(steps) == len(series) <= 9
        np.testing.assert_array_equal(series["loss"], -steps)
        if n:
            assert steps[-1] == n - 1
            assert len(steps) >= min(n, 4)
            inner = np.diff(steps[:-1])
            assert (inner == inner[:1]).all()  # evenly spread over the whole run

    def test_steps_that_come_again_replace_what_was_lost(self):
        series = Series(("step", "loss"), capacity=100)
        for step in range(50):
            series.append({"step": step, "loss": 0.0})
        for step in (20, 21, 22):
            series.append({"step": step, "loss": 1.0})
        np.testing.assert_array_equal(series["step"], range(23))
        np.testing.assert_array_equal(series["loss"], [0.0] * 20 + [1.0] * 3)

    def test_what_is_missing_is_nan(self):
        series = Series(("step", "loss"))
        series.append({"step": 1, "loss": None})
        assert np.isnan(series["loss"]).all()


class TestRecord:
    def test_a_life(self):
        record = RunRecord("abc")
        assert record.status(0) == "starting"
        record.apply(events.Published(**RUN, version=0, address="a", checkpoint=None), at=1.0)
        record.apply(progress(10), at=2.0)
        record.apply(progress(30), at=3.0)
        record.apply(events.Scored(**RUN, chunks=[[0, 1, 10], [1, 1, 20]], examples=64, per_second=99.0), at=3.0)
        record.apply(events.Published(**RUN, version=40, address="a", checkpoint=None), at=3.5)
        record.apply(progress(50), at=4.0)
        record.apply(events.Evaluated(**RUN, version=40, loss=0.5, error=0.25), at=4.0)
        assert record.status(5.0) == "running"
        assert record.progress["step"].tolist() == [10, 30, 50]
        assert record.progress["learned_per_second"][1:].tolist() == pytest.approx([3200.0, 3200.0])
        assert record.progress["published_behind"].tolist() == [10, 30, 10]
        assert record.progress["scored_behind"][-1] == 30
        assert record.progress["scored_per_second"][-1] == 99
        assert record.evaluations["error"].tolist() == [0.25]
        record.apply(events.Control(**RUN, attempt=1, want="pause"), at=6.0)
        assert record.status(600.0) == "paused"
        record.apply(events.Control(**RUN, attempt=1, want="run"), at=601.0)
        assert record.status(700.0) == "silent for 99 s"
        ended = events.Ended(**RUN, attempt=1, role="learner", outcome="finished", step=60, message="")
        record.apply(ended, at=701.0)
        assert record.status(9999.0) == "finished"
        assert record.log[-1].detail == "finished at step 60"

    def test_a_clock_that_was_set_back_hides_no_silence(self):
        record = RunRecord("abc")
        record.apply(progress(10), at=86_400.0)
        record.apply(progress(20), at=1.0)
        assert record.status(2.0) == "running"
        assert record.status(61.0) == "silent for 60 s"

    def test_a_learner_that_is_restarted(self):
        record = RunRecord("abc")
        for step in (10, 20, 30, 40):
            record.apply(progress(step), at=float(step))
        ended = events.Ended(**RUN, attempt=1, role="learner", outcome="left", step=40, message="")
        record.apply(ended, at=41.0)
        assert record.status(41.0) == "running"  # it has a successor
        record.apply(progress(25, incarnation=2, loss=2.0), at=42.0)
        record.apply(progress(45, incarnation=1, loss=9.0), at=42.5)  # the old one, not dead yet
        record.apply(progress(35, incarnation=2, loss=2.0), at=43.0)
        assert record.progress["step"].tolist() == [10, 20, 25, 35]
        assert record.progress["loss"].tolist() == [1.0, 1.0, 2.0, 2.0]
        assert list(record.restarts) == [25]
        assert [(h.what, h.detail) for h in record.log][-1] == ("learner", "incarnation 2 took over")

    def test_who_learns_is_logged_when_it_changes(self):
        record = RunRecord("abc")
        whole = events.Group(**RUN, learners=["a", "b"], scorers=0, why="")
        part = events.Group(**RUN, learners=["a"], scorers=1, why="1 of 2 score: most of a step is waiting")
        for at, event in enumerate([whole, whole, part, part]):
            record.apply(event, at=float(at))
        assert [(entry.time, entry.what, entry.detail) for entry in record.log] == [
            (0.0, "learners", "2 learn"),
            (2.0, "learners", "1 of 2 score: most of a step is waiting"),
        ]
        assert record.faults == 0

    def test_a_resumed_run_runs_again(self):
        record = RunRecord("abc")
        record.apply(progress(10), at=1.0)
        record.apply(events.Ended(**RUN, attempt=1, role="learner", outcome="stopped", step=10, message=""), at=2.0)
        assert record.status(3.0) == "stopped"
        record.apply(progress(20, incarnation=2), at=4.0)
        assert record.status(5.0) == "running"

    def test_memory_is_bounded(self):
        record = RunRecord("abc")
        for step in range(20_000):
            record.apply(progress(step), at=float(step))
            record.apply(events.Fault(**RUN, what="score", detail="x"), at=float(step))
        assert len(record.progress) <= 601
        assert len(record.log) == 200
        assert record.faults == 20_000


class TestRunWatcher:
    def test_receives_events_of_runs_and_nothing_else(self):
        watch = RunWatcher()
        record = progress(10).record()
        watch.log_event("isgd-abc", record)
        watch.log_event("isgd-other", record)  # not this run's topic
        watch.log_event("isgd-abc", "no event")
        watch.log_event("isgd-abc", {"kind": "progress"})
        watch.log_event("all", record)
        assert list(watch.runs) == ["abc"]
        assert watch.runs["abc"].progress["step"].tolist() == [10]

    def test_keeps_the_latest_runs(self):
        watch = RunWatcher()
        for number in range(100):
            fault = events.Fault(run=f"r{number}", incarnation=0, what="x", detail="y")
            watch.receive(f"isgd-r{number}", fault.record(), at=float(number))
        assert [record.run for record in watch.latest_first()] == [f"r{n}" for n in range(99, 67, -1)]
