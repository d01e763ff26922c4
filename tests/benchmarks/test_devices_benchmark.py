"""The benchmark of devices still runs, and its lines say what its runs hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import devices
import simulation


@pytest.mark.skipif(not simulation.FOLDER.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_tiny_run(tmp_path):
    rows = devices.main(["--tiny"])
    assert len(rows) == len(list(devices.grid([0], [0.2], [200])))
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(devices.load(path).values()) == json.loads(json.dumps(rows))


def run(arm: devices.Arm, share: float, rate: float, losses: list[float]) -> dict[devices.Run, dict[str, object]]:
    row = {"test_error": 0.1, "diverged": False}
    return {devices.Run(arm, share, 200, rate, seed): {**row, "final_loss": loss} for seed, loss in enumerate(losses)}


def test_the_best_rate_of_each_arm_is_compared_seed_by_seed():
    feedback = devices.FEEDBACK
    rows = (
        run(devices.ONE, 1.0, 0.2, [0.5, 0.5, 0.5])
        | run(devices.ONE, 1.0, 0.4, [0.2, 0.4, 0.3])
        | run(feedback, 0.7, 0.2, [0.3, 0.3, 0.3])
        | run(feedback, 0.7, 0.4, [0.9, 0.9, 0.1])
        | run(feedback, 1.0, 0.4, [0.1, 0.2, 0.6])
    )
    first, second = devices.summary(rows)
    assert "(rate 0.2) after 0.7 of 200 updates of 1 learner, uniform (rate 0.4)" in first
    assert "1.000 of its in the median, 1.50, 0.75, 1.00: reached" in first
    assert "rate 0.4: final loss over that of uniform draws at the same rate and horizon" in second
    assert "mean 1.000, largest 2.000 of 3 pairs" in second


def test_a_run_that_diverged_is_never_the_best():
    rows = run(devices.ONE, 1.0, 0.2, [0.5]) | run(devices.ONE, 1.0, 0.4, [float("nan")])
    rows[devices.Run(devices.ONE, 1.0, 200, 0.4, 0)]["diverged"] = True
    assert devices.best(rows, devices.ONE, 1.0, 200)[0] == 0.2
