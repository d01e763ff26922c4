"""The benchmarks of scale and publication still run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    monkeypatch.syspath_prepend(SCRIPTS)
    return runpy.run_path(str(SCRIPTS / name))["main"](["--tiny"])


def test_publication(monkeypatch, capsys):
    (row,) = run("publication.py", monkeypatch)
    assert row["scorers"] == 2
    assert 0 < row["stall_ms"] <= row["stall_worst_ms"]
    assert row["ours_s"] > 0 < row["bare_s"]
    assert "1 MB to 2 processes" in capsys.readouterr().out


@pytest.mark.slow  # four processes, and stubs that wait for a second each
def test_scale(monkeypatch, capsys):
    (row,) = run("scale.py", monkeypatch)
    assert row["threads"] == 4
    for kind in ("ours", "bare"):
        assert 0 < row[kind]["busy"] <= 1.01
        assert row[kind]["coordinator_ms_per_task"] > 0
    assert "4 threads  learner, ours over bare" in capsys.readouterr().out
