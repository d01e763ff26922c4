"""In a real terminal the progress is one line at every width, with bar, steps and time left always."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "terminal"
SHOW = """
import sys, time
from dask_isgd.display.live import LiveProgress
values = {"loss": 0.2312, "validation_error": 0.0444, "gain": 1.82, "steps_per_second": 812.4, "mean_age": 45.0}
with LiveProgress(sys.stderr, steps=40_000) as progress:
    for step in (0, 9_000, 12_345, 40_000):
        progress({**values, "step": step, "evaluated": 9_000, "status": "finished" if step == 40_000 else "training"})
        time.sleep(0.3)
"""


@pytest.mark.parametrize(
    ("columns", "figures"),
    [
        (80, ()),
        (120, ("training loss 0.231",)),
        (200, ("training loss 0.231", "validation error 4.44 % at step 9,000", "gain 1.82×", "steps per second 812")),
    ],
)
def test_progress_fits_the_terminal(columns, figures):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, SCRIPT, str(columns), sys.executable, "-c", SHOW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.partition("|")[2] for line in done.stdout.splitlines()]
    assert {len(line) for line in lines} == {columns + 1}
    assert "finished" in lines[-1]
    assert "step 40,000 of 40,000" in lines[-1]
    (during,) = {line for line in lines if "step 12,345 of 40,000" in line}
    for part in ("training", "━", "left", *figures):
        assert part in during
    if not figures:
        assert during.rstrip("| ").endswith("left")
