"""The benchmark of scoring tasks still runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scoring.py"


def test_tiny_run():
    command = [sys.executable, str(SCRIPT), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert row["chunk"] == 512
    assert row["plain_per_second"] > 0
    assert row["wall"] > 0 < row["cpu"]
