"""The benchmark of seconds to a loss compares the shortest horizon that is good enough, and still runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import simulation
import wall_clock


def row(arm: str, share: float, seconds: float, loss: float, rate: float = 0.1, seed: int = 0) -> dict:
    fields = {"arm": arm, "share": share, "steps": round(100 * share), "rate": rate, "seed": seed}
    return {**fields, "seconds": seconds, "loss": loss, "error": 0.1}


def test_the_shortest_horizon_that_is_good_enough_counts():
    rows = [
        row("plain", 1.0, 10.0, 0.30),
        row("plain", 1.0, 11.0, 0.25, rate=0.2),
        row("uniform", 1.0, 20.0, 0.20),
        row("feedback", 0.5, 8.0, 0.24),
        row("feedback", 0.5, 9.0, 0.60, rate=0.2),
        row("feedback", 1.0, 16.0, 0.10),
    ]
    *table, _, uniform, plain = wall_clock.summary(rows)
    assert len(table) == 2 + 4, "the best rate of each arm and horizon"
    assert "final loss of uniform after 0.80 of its seconds in the median (0.80;" in uniform
    assert f"final loss of plain after {8 / 11:.2f} of its seconds" in plain


def test_a_loss_that_no_horizon_reaches_is_infinite():
    assert (
        "after inf of its seconds" in wall_clock.summary([row("plain", 1.0, 9, 0.2), row("feedback", 1.0, 8, 0.3)])[-1]
    )


@pytest.mark.slow  # two clusters, one after the other
@pytest.mark.skipif(not simulation.FOLDER.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_tiny_run(tmp_path, capsys):
    options = ["--steps", "64", "--shares", "1", "--rates", "0.04", "--seeds", "0"]
    options += ["--arms", "plain", "uniform", "feedback, averaged"]
    rows = wall_clock.main([*options, "--data", str(tmp_path), "--to", str(tmp_path / "out.jsonl")])
    assert [each["arm"] for each in rows] == ["plain", "uniform", "feedback, averaged"]
    assert all(each["seconds"] > 0 and 0 < each["loss"] < 2.3 for each in rows)
    assert "final loss of plain after" in capsys.readouterr().out
