"""The table of the pipelines beside their uniform twins says what the runs did."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import twins


def run(loss, error=0.1):
    steps = np.arange(1, len(loss) + 1) * 20
    validation = {"loss": 0.5, "error": error}
    return {"step": steps, "seconds": steps / 10, "loss": np.array(loss), "gain": np.ones(20), "validation": validation}


def test_updates_are_counted_to_the_loss_that_the_uniform_run_ended_with():
    uniform, weighted = run(np.linspace(2, 1, 20)), run(np.linspace(2, 0.1, 20))
    row = twins.pair("digits", 0, uniform, weighted)
    assert row["loss"]["uniform"] == pytest.approx(1 + 0.5 / 19)
    first = next(i for i in range(20) if np.mean(weighted["loss"][max(0, i - 1) : i + 1]) <= row["loss"]["uniform"])
    assert row["updates"] == row["seconds"] == (first + 1) / 20
    assert row["steps"] == 400


def test_a_loss_that_is_never_reached_says_so():
    row = twins.pair("digits", 0, run([1.0] * 20), run([2.0] * 20))
    assert row["updates"] is None
    assert twins.table([row]).endswith(
        "| `digits` | 400 | 1 | 1 → 2 | 10.00% → 10.00% | 1 | not reached | not reached |"
    )


def test_a_regression_shows_its_validation_loss():
    row = twins.pair("relief", 0, run([1.0] * 20, float("nan")), run([1.0] * 20, float("nan")))
    assert "0.5 (loss) → 0.5 (loss)" in twins.table([row])


@pytest.mark.slow  # two commands that start a cluster each
def test_a_short_pair(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    (row,) = twins.main(["digits", "--steps", "60", "--to", str(out), "--data", str(tmp_path)])
    assert row["loss"]["uniform"] > 0 < row["loss"]["weighted"]
    assert "| `digits` | 60 | 1 |" in capsys.readouterr().out
    assert twins.main(["digits", "--to", str(out), "--table"]) == [row]
