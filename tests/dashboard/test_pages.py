"""The pages: listed where people look, escaped, absent without Bokeh, added to a scheduler that runs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import dask
import pytest
from bokeh.models import Span
from distributed import Client, LocalCluster, Scheduler

import dask_isgd as isgd
from dask_isgd import events
from dask_isgd.dashboard import dask_setup, page_text
from dask_isgd.dashboard.line_panels import closed_spans
from dask_isgd.dashboard.pages import PAGES, Page
from dask_isgd.dashboard.panels import PANELS
from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.dashboard.run_watcher import RunWatcher, watch
from dask_isgd.errors import ClusterMismatchError
from dask_isgd.runtime import dask_internals

pytestmark = pytest.mark.cluster

EVIL = "<img src=x onerror=alert(1)>"


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def base(client: Client) -> str:
    return client.dashboard_link.removesuffix("/status")


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


class TestListed:
    def test_our_cluster_lists_the_pages(self, client):
        plots = json.loads(get(f"{base(client)}/individual-plots.json"))
        for path in PAGES:
            assert (path in plots.values()) == path.startswith("/individual-")
        assert plots["Individual Isgd Overview"] == "/individual-isgd-overview"

    def test_the_navigation_names_the_page(self, client):
        page = get(f"{base(client)}/isgd")
        assert '<a href="isgd">' in page
        assert '<a href="individual-isgd-weights">Isgd Weights</a>' in page

    def test_attach_notes_that_the_pages_were_already_there(self, client):
        found = isgd.attach_dashboard(client)
        assert found.listed
        assert found.note == ""
        assert get(found.link)

    @pytest.mark.parametrize(
        "setting",
        [
            {"distributed.scheduler.preload": ["dask_isgd.dashboard"]},
            {
                "distributed.scheduler.http.routes": [
                    *dask.config.get("distributed.scheduler.http.routes"),
                    "dask_isgd.dashboard",
                ]
            },
        ],
        ids=["preload", "routes"],
    )
    def test_by_configuration(self, setting, tmp_path):
        """In a process of its own: importing is what lists the pages."""
        file = tmp_path / "isgd-test.yaml"
        (key, value), *_ = setting.items()
        inner: object = value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        file.write_text(json.dumps(inner))
        code = """
import asyncio, sys, json, urllib.request
from distributed import Scheduler
async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard=True, dashboard_address="127.0.0.1:0") as scheduler:
        url = f"http://127.0.0.1:{scheduler.http_server.port}"
        read = lambda path: urllib.request.urlopen(url + path, timeout=30).read().decode()
        plots = await asyncio.to_thread(read, "/individual-plots.json")
        assert "/individual-isgd-loss" in json.loads(plots).values()
        assert "Isgd Overview" in await asyncio.to_thread(read, "/isgd")
        assert "torch" not in sys.modules
asyncio.run(main())
"""
        environment = {
            "DASK_CONFIG": str(file),
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        }
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


class TestAttach:
    def test_to_a_scheduler_that_runs(self):
        """In a process of its own, where no other test has listed the pages."""
        code = """
import json, sys, urllib.request
import dask_isgd as isgd
from distributed import Client, LocalCluster
settings = dict(n_workers=0, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address="127.0.0.1:0")
with LocalCluster(**settings) as cluster, Client(cluster) as client:
    client.log_event("isgd-abc", {"kind": "fault", "run": "abc", "incarnation": 1, "what": "x", "detail": "y"})
    client.get_events("isgd-abc")
    for _ in range(2):
        found = isgd.attach_dashboard(client)
        assert not found.listed and "--preload dask_isgd.dashboard" in str(found), found
    read = lambda url: urllib.request.urlopen(url, timeout=30).read().decode()
    assert "bokeh" in read(found.link)
    assert "bokeh" in read(client.dashboard_link)
    base = found.link.removesuffix("/isgd")
    assert "/individual-isgd-loss" not in json.loads(read(base + "/individual-plots.json")).values()
    assert "bokeh" in read(base + "/individual-isgd-loss")
    from dask_isgd.dashboard.run_watcher import watch
    assert watch(cluster.scheduler).runs["abc"].faults == 1  # what the scheduler remembered
    assert "torch" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment())

    def test_without_a_dashboard(self):
        # an address of its own all the same: Dask serves HTTP without a dashboard, too, by default on a fixed port
        settings = {"n_workers": 0, "processes": False, "dashboard_address": "127.0.0.1:0"}
        with (
            LocalCluster(**settings, scheduler_kwargs={"dashboard": False}) as cluster,
            Client(cluster) as client,
            pytest.raises(ClusterMismatchError, match="has no dashboard; start it with one"),
        ):
            isgd.attach_dashboard(client)


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class TestWithoutBokeh:
    def test_the_scheduler_runs_and_there_is_no_page(self):
        code = """
import sys
sys.modules["bokeh"] = None
import asyncio
import dask_isgd.dashboard
from distributed import Scheduler
async def main():
    settings = dict(host="127.0.0.1", port=0, dashboard=True, dashboard_address="127.0.0.1:0")
    async with Scheduler(preload=["dask_isgd.dashboard"], **settings) as scheduler:
        scheduler.log_event("isgd-abc", {"kind": "fault", "run": "abc", "incarnation": 1, "what": "x", "detail": "y"})
        assert dask_isgd.dashboard._attach(scheduler) in ("no bokeh", "no dashboard")
asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-c", code], timeout=120, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Failed to start preload" not in done.stderr
        assert "Traceback" not in done.stderr


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


class TestMetrics:
    def test_runs_are_on_dasks_endpoint(self, client):
        pytest.importorskip("prometheus_client")
        for kind, more in (("fault", {"what": "x", "detail": 'a"b\n'}), ("scored", SCORED)):
            client.log_event("isgd-metrics", {"kind": kind, "run": "metrics", "incarnation": 1, **more})
        client.get_events("isgd-metrics")
        found = get(f"{base(client)}/metrics")
        assert 'isgd_run_faults_total{run="metrics"} 1.0' in found
        assert 'isgd_run_scored_examples_per_second{run="metrics"} 7.5' in found
        assert "dask_scheduler_workers" in found


SCORED = {"chunks": [], "examples": 1, "per_second": 7.5}


class TestCanary:
    """A release of distributed that moves what the dashboard relies on fails here."""

    def test_the_private_parts_are_where_they_were(self):
        from distributed.dashboard import scheduler as module

        assert isinstance(module.applications, dict)
        assert "/individual-isgd-loss" in module.applications
        assert "plot_div" in dask_internals.page_template().render(plot_div="plot_div")

        async def main() -> None:
            settings = {"host": "127.0.0.1", "port": 0, "dashboard": True, "dashboard_address": "127.0.0.1:0"}
            async with Scheduler(**settings) as scheduler:
                assert dask_internals.serves_page(scheduler, "/isgd") is True
                assert dask_internals.serves_page(scheduler, "/no-such-page") is False
                dask_setup(scheduler)
                dask_setup(scheduler)
                assert module.template_variables(scheduler)["pages"].count("isgd") == 1
                assert watch(scheduler) is watch(scheduler) is scheduler.plugins[RunWatcher.name]

        asyncio.run(main())


class TestJupyterLab:
    def test_the_layout_file_opens_pages_that_there_are(self):
        """``notebooks/isgd.jupyterlab-workspace``: each pane names a page, and each is placed once."""
        file = Path(__file__).parents[2] / "notebooks" / "isgd.jupyterlab-workspace"
        data = json.loads(file.read_text())["data"]
        panes = {
            key: value["data"]["route"] for key, value in data.items() if key.startswith("dask-dashboard-launcher:")
        }
        assert panes
        for key, route in panes.items():
            assert f"/{route}" in PAGES
            assert json.dumps(data["layout-restorer:data"]).count(f'"{key}"') == 1


class TestSpans:
    def test_a_run_is_one_span_with_names_that_read_well(self, client, digits, run_dir):
        learning = isgd.Learning(steps=60, batch_size=32, publish_every=20, report_every=10, threads=1)
        model = "dask_isgd.pipelines.models:digits"
        run = isgd.fit(client, model, digits, run_dir, learning=learning, validation=digits.split("test"))
        run.wait(timeout=120)

        def names(tag, dask_scheduler):
            found = list(dask_scheduler.extensions["spans"].find_by_tags(tag))
            return len(found), sorted(group.prefix.name for span in found for group in span.groups)

        number, prefixes = client.run_on_scheduler(names, f"isgd-{run.id}")
        assert number == 1
        assert {f"{what}-{run.name}" for what in ("learn", "coordinate", "score", "evaluate")} <= set(prefixes)
