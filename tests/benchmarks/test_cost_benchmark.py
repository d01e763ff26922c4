"""The benchmark of cost still runs, and judges its figures as its rows require."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    *("cost", "cost_arms", "cost_clusters", "cost_problems"),
    *("cost_processes", "cost_rows", "cost_startup", "plain"),
)


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return ``cost.py`` as a module: workers import its neighbours by name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("cost")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.slow  # three processes and a cluster each, and windows of seconds
@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("scored/mlp-64", "learner_threads"),  # the learner, on the library's cluster, beside scorers
        ("scoring-0.1s/mlp-64@worker", "learner_threads"),  # tasks, on processes started by hand
    ],
)
def test_quick_run(name: str, unit: str, cost: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = cost.main(["--quick", "--rows", name])
    assert row["row"] == name
    assert row["ours_per_second"] > 0 < row["plain_per_second"]
    assert row["ratio"] == pytest.approx(row["ours_per_second"] / row["plain_per_second"])
    assert row["reached"] == (row["ratio"] >= row["must"])
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[0])["row"] == name
    assert f"| {name} |" in printed[-1]


def test_rows_are_chosen_by_name(cost, capsys):
    cost.main(["--list", "--rows", "uniform-1/mlp-*", "start-up"])
    names = capsys.readouterr().out.split()
    assert {"uniform-1/mlp-64", "uniform-1/mlp-64@client", "uniform-1/mlp-64@worker", "start-up"} <= set(names)
    assert all(name == "start-up" or name.startswith("uniform-1/mlp-") for name in names)
    with pytest.raises(SystemExit):
        cost.main(["--rows", "no-such-row"])


def test_a_rate_needs_two_moments_inside_its_window(cost):
    rate = sys.modules["cost_arms"].rate
    clock, done = np.array([0.0, 1.0, 2.0, 3.0, 9.0]), np.array([0, 10, 30, 50, 51])
    assert rate(clock, done, (0.5, 3.5), "reports") == 20.0
    with pytest.raises(RuntimeError, match=r"got 1 reports in 1\.0 s, wanted at least 2"):
        rate(clock, done, (8.5, 9.5), "reports")


def test_no_process_inherits_what_a_nanny_left_behind(cost, monkeypatch):
    clean_environment = sys.modules["cost_processes"].clean_environment
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)  # from a nanny of another test
    with clean_environment():
        assert "OMP_NUM_THREADS" not in os.environ
        assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(SCRIPTS)
        os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "1"
