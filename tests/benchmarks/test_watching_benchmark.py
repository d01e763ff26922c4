"""The benchmark of the dashboard still runs at its smallest size; people judge its figures."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_tiny_run(capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "watching.py"
    assert runpy.run_path(str(path))["main"](repeats=1, seconds=1.0, pages=1) > 0
    assert "steps/s without a page" in capsys.readouterr().out
