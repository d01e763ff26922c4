"""The benchmarks of the feed still run, and their lines have every method."""

from __future__ import annotations

import json
import runpy
from pathlib import Path


def last_line(name, capsys):
    path = Path(__file__).parents[2] / "benchmarks" / name
    runpy.run_path(str(path))["main"](["--tiny"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_speed(capsys):
    found = last_line("feed.py", capsys)
    assert found["rows"].keys() >= {"in memory", "rows of uncompressed chunks", "local copy of zstd", "oindex"}
    assert "drawn ahead, memory 1/10, zstd" in found["rows"]
    assert found["scan"].keys() >= {"raw: scan", "zstd: scan"}
    assert found["training"]["in memory"] == 1


def test_training(capsys):
    found = last_line("feed_training.py", capsys)
    assert found["feed"].keys() == found["direct"].keys()
    assert found["feed"]["final_loss"] > 0
