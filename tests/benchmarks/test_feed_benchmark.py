"""The benchmark of the feed still runs, and its line has every method."""

from __future__ import annotations

import json
import runpy
from pathlib import Path


def test_tiny_run(capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "feed.py"
    runpy.run_path(str(path))["main"](["--tiny"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rows"].keys() >= {"in memory", "rows of uncompressed chunks", "local copy of zstd", "oindex"}
    assert found["scan"].keys() >= {"raw: scan", "zstd: scan"}
    assert found["training"]["in memory"] == 1
