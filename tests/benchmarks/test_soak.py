"""The soak benchmark still runs; its ten minutes need a quiet machine."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow  # three processes are killed and restarted, each importing torch
def test_each_role_is_killed_once_and_all_requirements_are_met(capsys):
    result = runpy.run_path(str(SCRIPT))["main"](["--tiny"])
    assert result["kills"] == 3
    assert {kill["role"] for kill in result["each kill"]} == {"learner", "scorer", "coordinator"}
    assert result["lost beyond the promise"] == result["double rows"] == result["gaps"] == result["older received"] == 0
    assert result["incarnations of the learner"] >= 2
    assert "kills of learners" in capsys.readouterr().out
