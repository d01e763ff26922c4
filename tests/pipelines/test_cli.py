"""The command line: usage, errors before any cluster, exit codes, what goes to which stream."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from command_line import invoke, make_run

from dask_isgd.pipelines.commands import show
from dask_isgd.pipelines.commands import train as training
from dask_isgd.storage import Dataset, write_dataset


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, and no cluster whatever happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "connector", lambda *_: pytest.fail("a cluster was started"))
    return tmp_path


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
