"""The benchmark of memory still runs, and sees growth."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch):
    """``memory.py`` as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("memory")
    for name in ("memory", "apart"):
        sys.modules.pop(name, None)


def test_the_slope_leaves_out_the_first_steps(memory):
    readings = [{"step": step, "learner": 100 + (900 if step < 20 else 0.2 * step)} for step in range(0, 100, 10)]
    assert memory.slope(readings, "learner", 20) == pytest.approx(2000.0)


@pytest.mark.slow  # four processes that import torch
def test_every_process_is_followed(memory, capsys):
    result = memory.main(["--tiny"])
    assert set(result["MB per 10,000 steps"]) == set(memory.ROLES)
    assert all(min(reading[role] for role in memory.ROLES) > 10 for reading in result["readings, MB"])
    assert result["censuses"][-1]["learner"]["blocks"] > 100_000
    assert "MB per 10,000 steps" in capsys.readouterr().out
