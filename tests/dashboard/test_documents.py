"""What panels and pages draw of a record: nothing, something and everything, escaped, and only if it has changed."""

from __future__ import annotations

import pytest
from bokeh.models import Span

from dask_isgd import events
from dask_isgd.dashboard import page_text
from dask_isgd.dashboard.line_panels import closed_spans
from dask_isgd.dashboard.pages import Page
from dask_isgd.dashboard.panels import PANELS
from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.dashboard.run_watcher import RunWatcher

EVIL = "<img src=x onerror=alert(1)>"


def full_record() -> RunRecord:
    """A record in which every panel has something to show."""
    record = RunRecord("abc")
    values = dict.fromkeys(("loss", "gain", "candidate_gain", "mean_age", "ess_fraction"), 0.5)
    values |= {"variance_ideal": 1.0, "variance_stale": -1.0, "variance_uniform": 9.0, "largest_coefficient": 3.0}
    for step in range(10, 110, 10):
        seen = {**values, "examples": step * 32.0, "seconds": step / 10}
        open_ = step > 50
        event = events.Progress(run="abc", incarnation=1, step=step, address="a", open=open_, values=seen)
        record.apply(event, at=float(step))
    record.apply(events.Evaluated(run="abc", incarnation=1, version=100, loss=0.3, error=0.1), at=100.0)
    record.apply(events.Scored(run="abc", incarnation=1, chunks=[[0, 1, 90]], examples=1, per_second=5.0), at=100.0)
    summary = events.WeightSummary(
        run="abc",
        incarnation=1,
        step=100,
        cells=[-1, *range(99)],
        chunks=200,
        never=2,
        age_high=99.0,
        age_counts=[3, 1],
        weight_low=-2.0,
        weight_high=1.0,
        weight_counts=[1, 2, 3],
        zeros=1,
        sampled=7,
        top_share=0.25,
    )
    record.apply(summary, at=100.0)
    return record


class TestDocuments:
    @pytest.mark.parametrize("name", PANELS)
    def test_a_panel_draws_nothing_something_and_everything(self, name):
        panel = PANELS[name]()
        for record in (RunRecord("empty"), full_record()):
            panel.update(record)
            lengths = {len(values) for values in panel.source.data.values()}
            assert len(lengths) == 1
        assert lengths != {0}

    @pytest.mark.parametrize("name", PANELS)
    def test_axes_are_hidden_until_there_is_something_and_every_title_is_explained(self, name):
        panel = PANELS[name]()
        if panel.axes:
            parts = [*panel.root.axis, *panel.root.grid, *panel.root.legend, *panel.root.select({"type": Span})]
            assert not any(part.visible for part in parts)
            panel.update(full_record())
            assert all(part.visible for part in parts)
        assert panel.meaning.endswith(".")
        assert any(panel.meaning in str(getattr(tool, "description", "")) for tool in panel.root.tools)

    def test_an_error_of_nothing_is_shown_on_the_logarithmic_axis(self):
        record = RunRecord("abc")
        for version, error in ((100, 0.2), (200, 0.0)):
            record.apply(events.Evaluated(run="abc", incarnation=1, version=version, loss=0.3, error=error), at=100.0)
        panel = PANELS["error"]()
        panel.update(record)
        assert panel.source.data["error"].tolist() == [0.2, 0.1]
        assert panel.root.title.text == "Validation error: 0.00 %"

    def test_the_header_has_the_name_the_steps_and_the_time_left(self):
        record = RunRecord("my-run-0123abcd")
        values = {"steps_per_second": 10.0}
        record.apply(
            events.Progress(run="r", incarnation=1, step=200, steps=800, address="", open=True, values=values), at=100.0
        )
        text = page_text.header(record, 101.0)
        for part in (">my-run<", ">200 of 800<", ">1 min 0 s<"):
            assert part in text
        assert page_text.label(record, 101.0) == "my-run · running · step 200 of 800"

    def test_without_classes_the_loss_replaces_the_error(self):
        record = RunRecord("abc")
        nan = float("nan")
        record.apply(events.Evaluated(run="abc", incarnation=1, version=100, loss=0.3, error=nan), at=100.0)
        panel = PANELS["error"]()
        panel.update(record)
        assert panel.source.data["error"].tolist() == [0.3]
        assert panel.root.title.text == "Validation loss: 0.3"

    def test_a_page_follows_the_latest_run_or_the_chosen_one(self):
        watcher = RunWatcher()
        page = Page(watcher, {})
        assert "No run yet" in page.header.text
        for number, run in enumerate(("aaa", "bbb")):
            fault = events.Fault(run=run, incarnation=1, what="x", detail=f"of {run}")
            watcher.receive(f"isgd-{run}", fault.record(), at=float(number))
        page.update()
        assert "of bbb" in page.event_log.text
        page.select.value = "aaa"
        assert "of aaa" in page.event_log.text
        assert [value for value, _ in page.select.options[1:]] == ["bbb", "aaa"]

    def test_a_page_that_is_up_to_date_sends_nothing(self):
        watcher = RunWatcher()
        watcher.runs["abc"] = full_record()
        page = Page(watcher, {name: make() for name, make in PANELS.items()})
        before = {name: panel.source.data for name, panel in page.panels.items()}
        page.update()
        assert all(panel.source.data is before[name] for name, panel in page.panels.items())

    def test_everything_is_escaped(self):
        watcher = RunWatcher()
        record = watcher.runs[EVIL] = RunRecord(EVIL)
        record.apply(events.Fault(run=EVIL, incarnation=1, what=EVIL, detail=EVIL), at=1.0)
        record.apply(
            events.Ended(run=EVIL, incarnation=1, attempt=1, role="learner", outcome=EVIL, step=1, message=EVIL), at=2.0
        )
        page = Page(watcher, {})
        for text in (page.header.text, page.event_log.text):
            assert "<img" not in text
            assert "&lt;img" in text

    def test_where_the_gate_was_closed(self):
        step, gate = [10, 20, 30, 40, 50], [0, 0, 1, 0, 0]
        assert closed_spans(step, gate) == ([0.0, 40.0], [30.0, 50.0])
        assert closed_spans([], []) == ([], [])
        assert closed_spans([10], [1]) == ([], [])
