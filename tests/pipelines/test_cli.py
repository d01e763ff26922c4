"""The command line: usage, errors before any cluster, exit codes, what goes to which stream."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from dask_isgd.pipelines.cli import isgd
from dask_isgd.pipelines.commands import show
from dask_isgd.pipelines.commands import train as training
from dask_isgd.storage import Dataset, History, RunDirectory, write_dataset


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, and no cluster whatever happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "connector", lambda *_: pytest.fail("a cluster was started"))
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(isgd, [str(a) for a in arguments])


def make_run(folder, *, rows=30):
    directory = RunDirectory(folder)
    directory.create({"run": "abc", "config": {"learning": {"steps": 600}, "sampling": {"uniform": False}}})
    columns = ["seconds", "loss", "gain", "variance_ideal", "variance_stale", "variance_uniform", "gate", "mean_age"]
    history = History.create(directory.history, "learner-0001", columns, max(rows, 1))
    for i in range(rows):
        values = {"seconds": i / 10, "loss": 2 / (i + 1), "gain": 1.5, "gate": 1.0, "mean_age": 20.0}
        traces = {"variance_ideal": 1.0, "variance_stale": 4.0, "variance_uniform": 9.0}
        history.append({"step": 20.0 * (i + 1), **values, **traces})
    history.flush()
    return directory


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "Usage"),
            (("prepare", "imagenet"), "'imagenet' is not one of 'digits', 'fashion-mnist', 'svhn'"),
            (("train", "digit"), "Did you mean 'digits'?"),
            (("train", "imagenet"), "Pass digits, fashion-mnist, svhn"),
            (("train", "missing.yaml"), "there is no file 'missing.yaml'; check the path"),
            (("train", "digits", "--workers", "0"), "0 is not in the range x>=1"),
            (
                ("train", "digits", "--workers", "2", "--scheduler", "tcp://x:1"),
                "cannot be used together; pass one",
            ),
            (("train", "digits", "--resume", "--overwrite", "--run", "r"), "cannot be used together; pass one"),
            (("train", "digits", "--uniform", "--synchronous"), "cannot be used together; pass one"),
            (("train", "digits", "--resume"), "--resume needs --run DIR, the run to resume"),
            (("plot", "r", "--to", "picture.bmp"), "wanted a file ending in .png"),
            (("export", "r", "--to", "model.onnx"), "wanted a file ending in .safetensors, .csv"),
            (("export", "r"), "Missing option '--to'"),
            (("compare", "r"), "compare needs at least two runs"),
        ],
    )
    def test_bad_usage_is_2(self, here, arguments, message):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize(
        "command", ["prepare", "train", "status", "list", "compare", "export", "pause", "unpause", "plot"]
    )
    def test_every_command_has_help(self, command):
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert "--debug" in result.output


class TestErrors:
    """One message on stderr, exit code 1, nothing on stdout, and no cluster."""

    def check(self, result, *parts):
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert "Traceback" not in result.stderr
        for part in parts:
            assert part in result.stderr

    def test_recipe(self, here):
        (here / "r.yaml").write_text("data: digits\nlearning: {step: 5}\nsampling: {gate: ajar}\n")
        result = invoke("train", "r.yaml", "--json")
        self.check(result, "r.yaml", "unknown key 'step'; did you mean 'steps'?", "Sampling.gate: got 'ajar'")

    def test_data(self, here):
        (here / "r.yaml").write_text("data: nowhere.zarr\nmodel: torch.nn:Identity\nlearning: {steps: 5}\n")
        self.check(invoke("train", "r.yaml"), "nowhere.zarr")

    def test_model(self, here, monkeypatch):
        """A cluster on this machine is starting by then, but no client connects to it."""
        monkeypatch.setattr(training, "connector", lambda *_: lambda: pytest.fail("a client was connected"))
        (here / "r.yaml").write_text("data: digits\nmodel: no.such:thing\n")
        invoke("prepare", "digits")
        self.check(invoke("train", "r.yaml"), "no.such:thing")

    def test_files_that_are_missing(self, here):
        result = invoke("prepare", "fashion-mnist", "--from", here)
        self.check(result, "t10k-images-idx3-ubyte.gz", "apt install dataset-fashion-mnist")

    def test_split(self, here):
        arrays = {"x": np.zeros((8, 2), np.float32), "y": np.zeros(8, np.int64)}
        write_dataset(here / "a.zarr", "train", arrays, inputs="x", target="y", chunk_size=4)
        (here / "r.yaml").write_text("data: a.zarr\nmodel: torch.nn:Identity\nvalidation: test\nlearning: {steps: 5}\n")
        self.check(invoke("train", "r.yaml"), "test", "train")

    def test_a_run_that_exists_names_options(self, here):
        make_run(here / "r")
        result = invoke("train", "digits", "--run", "r")
        self.check(result, "already holds a run. Resume it (--resume), delete it and start again (--overwrite)")

    def test_a_run_directory_that_is_a_file(self, here):
        (here / "file").touch()
        self.check(invoke("train", "digits", "--run", "file"), "nothing can be created there", "is a file")

    @pytest.mark.parametrize(
        "arguments",
        [("status",), ("plot",), ("pause",), ("unpause",), ("stop",), ("export", "--to", "m.csv"), ("compare", "x")],
        ids=lambda arguments: arguments[0],
    )
    def test_no_run(self, here, arguments):
        command, *others = arguments
        self.check(invoke(command, "nothing", *others), "no run.json")

    def test_no_run_in_a_folder(self, here):
        self.check(invoke("list"), "no run in the folder runs")

    def test_debug_shows_the_traceback(self, here):
        result = invoke("status", "nothing", "--debug")
        assert type(result.exception).__name__ == "RunNotFoundError"

    def test_a_scheduler_that_does_not_answer(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
        result = run_process("train", "digits", "--scheduler", "tcp://127.0.0.1:9", cwd=tmp_path)
        assert result.returncode == 1
        assert result.stdout == ""
        assert "no reply from a Dask scheduler at 'tcp://127.0.0.1:9'" in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "runs").exists()


class TestPrepare:
    def test_prints_where(self, here):
        result = invoke("prepare", "digits")
        assert (result.exit_code, result.stdout) == (0, "data/digits.zarr\n"), result.output
        assert len(Dataset(here / "data" / "digits.zarr")) == 1438
        assert invoke("prepare", "digits").exit_code == 0
        assert invoke("prepare", "digits", "--to", "other.zarr").stdout == "other.zarr\n"


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


class TestJson:
    def test_is_one_strict_line(self):
        line = show.as_json({"a": float("nan"), "b": {"c": float("inf"), "d": 1.5}, "e": "x\ny", "f": None})
        assert "\n" not in line
        assert json.loads(line) == {"a": None, "b": {"c": None, "d": 1.5}, "e": "x\ny", "f": None}


def run_process(*arguments, cwd):
    # Where the package is not installed, its folder is on the path of this process only.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dask_isgd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


class TestProcess:
    def test_module(self, tmp_path):
        result = run_process("prepare", "digits", cwd=tmp_path)
        assert (result.returncode, result.stdout, result.stderr) == (0, "data/digits.zarr\n", "")

    def test_interrupts_have_their_codes(self, here, monkeypatch):
        from dask_isgd.pipelines.commands import prepare
        from dask_isgd.pipelines.commands.terminated import Terminated

        for error, code in ((KeyboardInterrupt, 128 + signal.SIGINT), (Terminated, 128 + signal.SIGTERM)):
            monkeypatch.setattr(prepare, "default_data", lambda name, error=error: (_ for _ in ()).throw(error))
            assert invoke("prepare", "digits").exit_code == code
