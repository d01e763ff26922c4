"""The benchmark of ingesting still runs, and its line has the documented entries."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_tiny_run():
    path = Path(__file__).parents[2] / "benchmarks" / "ingest.py"
    found = runpy.run_path(str(path))["main"](["--tiny"])
    assert found["above_memory_MB"] < 150
    assert not found["torch_imported"]
