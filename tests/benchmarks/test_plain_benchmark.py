"""The plain loop runs, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").exists(), reason="needs Debian's dataset-fashion-mnist"
)
def test_tiny_run():
    command = [sys.executable, str(ROOT / "benchmarks" / "plain.py"), "--steps", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    line = json.loads(done.stdout)
    assert line["threads"] == 1
    assert line["steps_per_second"] > 0
