"""The commands that read, compare, steer and export a run that exists: they need its directory and no cluster."""

import csv
import json

import numpy as np
import pytest
import torch
from command_line import invoke, make_run
from safetensors.torch import load_file

from dask_isgd.pipelines.commands import show
from dask_isgd.storage import History


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestStatusAndPlot:
    def test_status(self, here):
        make_run(here / "r")
        result = invoke("status", "r")
        assert result.exit_code == 0, result.output
        for part in ("step 600 of 600", "1.50×", "1, 2, 3", "gain: how many times", "last report"):
            assert part in result.stdout

    def test_status_of_a_run_that_has_only_begun(self, here):
        make_run(here / "r", rows=0)
        result = invoke("status", "r")
        assert result.exit_code == 0, result.output
        assert "step 0 of 600" in result.stdout

    def test_status_as_json(self, here):
        make_run(here / "r")
        values = json.loads(invoke("status", "r", "--json").stdout)
        assert (values["step"], values["of"], values["finished"]) == (600, 600, False)
        assert values["variance"] == {"ideal": 1.0, "stale": 4.0, "uniform": 9.0}

    def test_watch_a_run_that_continues(self, here, monkeypatch):
        """Each update prints a line; the last one prints the table."""
        directory = make_run(here / "r", rows=10)
        sleeps = []

        def sleep(seconds):
            sleeps.append(seconds)
            history = History.create(directory.history, f"learner-{len(sleeps) + 1:04d}", ["loss"], 1)
            history.append({"step": 200.0 + 20 * len(sleeps), "loss": 0.5})
            history.flush()
            if len(sleeps) == 3:
                directory.set_control(want="stop")

        monkeypatch.setattr(show.time, "sleep", sleep)
        result = invoke("status", "r", "--watch", "--every", "0.1")
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert sleeps == [0.1] * 3
        assert lines[0].startswith("running  step 200 of 600")
        assert "stopped, step 260 of 600" in result.stdout

    def test_watch_as_json_is_one_line_per_update(self, here, monkeypatch):
        directory = make_run(here / "r")
        monkeypatch.setattr(show.time, "sleep", lambda seconds: directory.set_control(want="stop"))
        result = invoke("status", "r", "--watch", "--json")
        assert [json.loads(line)["step"] for line in result.stdout.splitlines()] == [600, 600]

    def test_plot_as_a_page_of_its_own(self, here):
        make_run(here / "a <b> run")
        assert invoke("plot", "a <b> run", "--to", "p.html").exit_code == 0
        page = (here / "p.html").read_text()
        assert page.startswith("<!DOCTYPE html>")
        assert "<h1>a &lt;b&gt; run</h1>" in page
        assert "<svg" in page
        assert "1.50×" in page
        assert "src=" not in page

    @pytest.mark.parametrize(("to", "start"), [(None, b"\x89PNG"), ("a/b.svg", b"<?xml"), ("c.pdf", b"%PDF")])
    def test_plot(self, here, to, start):
        make_run(here / "r")
        result = invoke("plot", "r", *(["--to", to] if to else []))
        assert result.exit_code == 0, result.output
        path = here / result.stdout.strip()
        assert path.read_bytes().startswith(start)
        assert [p.name for p in path.parent.glob(".*.partial*")] == []


class TestSeveralRuns:
    def test_a_list(self, here):
        make_run(here / "runs" / "first")
        make_run(here / "runs" / "second", rows=0)
        (here / "runs" / "file").touch()
        result = invoke("list")
        assert result.exit_code == 0, result.output
        header, *rows = [line.split() for line in result.stdout.splitlines()]
        assert header == ["run", "status", "step", "validation", "error", "gain", "last", "report"]
        assert sorted(row[0] for row in rows) == ["first", "second"]
        assert next(row[:6] for row in rows if row[0] == "first") == ["first", "running", "600", "of", "600", "–"]

    def test_a_comparison(self, here):
        for name in ("one", "two"):
            make_run(here / name)
        result = invoke("compare", "one", "two", "--to", "both.svg")
        assert result.exit_code == 0, result.output
        assert [line.split() for line in result.stdout.splitlines() if line.startswith("gain")] == [
            ["gain", "1.50×", "1.50×"]
        ]
        assert result.stdout.endswith("plot saved to both.svg\n")
        assert (here / "both.svg").read_bytes().startswith(b"<?xml")


class TestControl:
    def test_pause_and_unpause(self, here):
        directory = make_run(here / "r")
        for command, want in (("pause", "pause"), ("unpause", "run"), ("stop", "stop")):
            result = invoke(command, "r")
            assert result.exit_code == 0, result.output
            assert directory.control()["want"] == want

    def test_a_finished_run(self, here):
        directory = make_run(here / "r")
        directory.checkpoints().commit(600, 1, {}, {"run": "abc", "finished": True})
        assert invoke("pause", "r").stdout == "run r has already finished, at step 600\n"
        assert directory.control()["want"] == "run"


class TestExport:
    def test_the_parameters_as_the_model_names_them(self, here):
        tensors = {
            "model.a.weight": np.ones((2, 3), "f4"),
            "model.b": np.zeros(2, "i2"),
            "optimizer.0.step": np.ones(1),
        }
        state = {"run": "abc", "dtypes": {"model.b": "bfloat16"}}
        make_run(here / "r").checkpoints().commit(40, 1, tensors, state)
        assert invoke("export", "r", "--to", "m.safetensors").exit_code == 0
        found = load_file(here / "m.safetensors")
        assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
            "a.weight": ((2, 3), torch.float32),
            "b": ((2,), torch.bfloat16),
        }

    def test_the_history(self, here):
        make_run(here / "r")
        assert invoke("export", "r", "--to", "folder/h.csv").exit_code == 0
        rows = list(csv.DictReader((here / "folder" / "h.csv").read_text().splitlines()))
        assert len(rows) == 30
        assert next(iter(rows[0])) == "step"
        assert (float(rows[29]["step"]), float(rows[29]["loss"])) == (600.0, 2 / 30)

    def test_nothing_to_export_yet(self, here):
        make_run(here / "r")
        result = invoke("export", "r", "--to", "m.safetensors")
        assert result.exit_code == 1
        assert "run r has no checkpoint yet" in result.output
