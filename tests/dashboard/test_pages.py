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
from distributed import Client, LocalCluster, Scheduler

import dask_isgd as isgd
from dask_isgd.dashboard import dask_setup
from dask_isgd.dashboard.pages import PAGES
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
