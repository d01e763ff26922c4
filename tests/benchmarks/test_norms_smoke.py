"""The benchmark of the norms still runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "norms.py"


def test_the_tiny_size_prints_every_ratio(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    tables = runpy.run_path(str(SCRIPT))["main"](["--tiny"])
    assert list(tables) == ["mlp", "small-mlp", "resnet", "transformer"]
    printed = capsys.readouterr().out
    for rows in tables.values():
        assert [r.name for r in rows[:5]] == ["training step", "training step with norms", "exact", "bound", "loss"]
        assert all(row.milliseconds > 0 and row.ratio > 0 for row in rows)
        assert all(row.name in printed for row in rows)


def test_the_benchmark_of_the_checks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    shares = runpy.run_path(str(SCRIPT.with_name("norms_checks.py")))["main"](["--tiny"])
    assert list(shares) == ["small-mlp", "resnet", "transformer"]
    assert all(share > 0 for share in shares.values())


def test_the_zoo_prints_its_ratios(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    runpy.run_path(str(SCRIPT))["main"](["--tiny", "--zoo", "GRU"])
    assert "| GRU |" in capsys.readouterr().out
