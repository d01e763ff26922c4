"""The plain loops run, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plain.py"


@pytest.mark.parametrize("work", ["training", "capture", "norms"])
def test_short_run(work):
    command = [sys.executable, str(SCRIPT), "mlp-64", "--work", work, "--rows", "512", "--seconds", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    line = json.loads(done.stdout)
    assert line["threads"] == 1
    assert line["per_second"] > 0
    assert 0 <= line["system_share"] < 1
