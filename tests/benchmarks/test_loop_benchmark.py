"""The loop's benchmark runs at a tiny size, and compares what it claims to."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_tiny_run():
    path = Path(__file__).parents[2] / "benchmarks" / "loop.py"
    found = runpy.run_path(str(path))["main"](["--examples", "20000", "--rounds", "2", "--minibatches", "16"])
    assert set(found["us_per_minibatch"]) == {"importance", "RandomSampler", "WeightedRandomSampler", "step"}
    assert all(cost > 0 for cost in found["us_per_minibatch"].values())
