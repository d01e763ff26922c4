"""The benchmark runs, so that it cannot rot."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "norms.py"


def test_the_tiny_size_prints_every_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    rows = runpy.run_path(str(SCRIPT))["main"](["--tiny"])
    assert [row.name for row in rows] == ["training step", "training step with norms", "exact", "bound", "loss"]
    assert all(row.milliseconds > 0 and row.ratio > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows)
