"""The benchmark of problems whose examples can all be fitted still runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import separable


def test_every_arm_of_every_problem_trains(capsys):
    found = separable.main(["--tiny"])
    assert list(found) == ["digits", "two classes"]
    assert capsys.readouterr().out.count("weighted, default") == 2
    for arms in found.values():
        assert all(0 < arm["loss"] < 1 for arm in arms.values())
        assert arms["uniform"]["clipped"] == arms["weighted, unclipped"]["clipped"] == 0
