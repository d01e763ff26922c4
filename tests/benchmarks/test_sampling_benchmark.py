"""The benchmark of sampling still runs, and its line has the documented entries."""

from __future__ import annotations

import json
import runpy
from pathlib import Path


def test_tiny_run(capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "sampling.py"
    runpy.run_path(str(path))["main"](["--tiny"])
    line = json.loads(capsys.readouterr().out)
    assert {"batch", "chunk", "sizes", "others", "scaling", "speedup", "cpprb"} == line.keys()
    assert all(row["draw"] > 0 for row in line["sizes"])
