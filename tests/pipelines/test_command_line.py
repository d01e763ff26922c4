"""The commands of the README, as processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import dask_isgd

pytestmark = pytest.mark.cluster

ROOT = Path(dask_isgd.__file__).absolute().parents[1]
TIMEOUT = 240


def isgd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dask_isgd", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ISGD_TEST_MARK": str(folder)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def left_running(folder: Path) -> list[str]:
    """Processes that a command in ``folder`` has left behind: children inherit its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ISGD_TEST_MARK") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture(scope="module")
def digits(folder: Path) -> subprocess.CompletedProcess[str]:
    """The first command of the README."""
    return isgd(folder, "train", "digits", "--run", "first", "--json")


def test_train_digits_ends_well(digits, folder):
    assert digits.returncode == 0, digits.stderr
    assert left_running(folder) == []
    assert not re.search(r"[Ww]arning|WARN|ERROR|Traceback|Exception", digits.stderr), digits.stderr


def test_its_last_line_is_json_with_the_promised_figures(digits):
    summary = json.loads(digits.stdout.splitlines()[-1])
    assert {
        "run",
        "steps",
        "seconds",
        "train_loss",
        "validation_error",
        "variance",
        "gain",
        "examples_scored",
        "steps_per_second",
    } <= set(summary)
    assert summary["steps"] == 800
    assert summary["validation_error"] < 0.04
    assert summary["variance"]["ideal"] <= summary["variance"]["stale"] < summary["variance"]["uniform"]
    assert summary["gain"] > 1.5
    assert summary["examples_scored"] > 0  # the run is over about a second after its first version


def test_it_shows_progress_and_leaves_a_picture(digits, folder):
    assert "step" in digits.stderr
    assert "gain" in digits.stderr
    assert (folder / "first" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_its_data_opens_in_xarray(digits, folder):
    import xarray as xr

    sizes = [xr.open_zarr(folder / "data" / "digits.zarr", group=g).sizes["sample"] for g in ("train", "test")]
    assert sum(sizes) == 1797
    assert sizes[1] == pytest.approx(0.2 * 1797, abs=1)


def test_status_and_plot_read_the_run_again(digits, folder):
    status = isgd(folder, "status", "first")
    assert status.returncode == 0
    assert "800" in status.stdout
    assert isgd(folder, "plot", "first", "--to", "again.png").returncode == 0
    assert (folder / "again.png").stat().st_size > 10_000


def test_a_finished_run_goes_on_with_resume_and_more_steps(digits, folder):
    again = isgd(folder, "train", "digits", "--run", "first", "--resume", "--steps", "900", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["steps"] == 900


def test_uniform_is_the_same_loop_without_scores(digits, folder):
    uniform = isgd(folder, "train", "digits", "--run", "uniform", "--uniform", "--steps", "200", "--json")
    assert uniform.returncode == 0, uniform.stderr
    summary = json.loads(uniform.stdout.splitlines()[-1])
    assert summary["steps"] == 200
    assert summary["examples_scored"] == 0
    assert summary["sampling"] == "uniform"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "digits", "--run", "first"), "resume"),
        (("train", "nothing"), "digits"),
        (("train", "digits", "--run", "other", "--resume"), "no run"),
        (("status", "nowhere"), "no run"),
        (("train", "fashion-mnist", "--from", "nowhere", "--data", "f.zarr"), "dataset-fashion-mnist"),
    ],
)
def test_mistakes_end_with_one_message_and_no_traceback(digits, folder, arguments, says):
    wrong = isgd(folder, *arguments)
    assert wrong.returncode in (1, 2)
    assert says in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_mistake_in_the_model_ends_the_cluster_that_has_been_started(digits, folder):
    (folder / "wrong.yaml").write_text("data: digits\nmodel: no.such:thing\n")
    wrong = isgd(folder, "train", "wrong.yaml")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("Error: model: ")
    assert len(wrong.stderr.splitlines()) == 1
    assert left_running(folder) == []


def test_debug_shows_the_traceback(digits, folder):
    assert "Traceback" in isgd(folder, "train", "digits", "--run", "first", "--debug").stderr
