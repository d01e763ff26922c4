"""The soak benchmark still runs; its ten minutes need a quiet machine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    """``soak.py`` as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("soak")
    for name in ("soak", "soak_faults", "soak_run", "apart"):
        sys.modules.pop(name, None)


@pytest.mark.slow  # three processes are killed and restarted, each importing torch
def test_each_role_is_killed_once_and_all_requirements_are_met(soak, capsys):
    result = soak.main(["--tiny", "--patience", "60"])
    assert result["faults"] == 3
    assert {fault["fault"] for fault in result["each fault"]} == {
        "learner killed",
        "scorer killed",
        "coordinator killed",
    }
    assert result["lost beyond the promise"] == result["double rows"] == result["gaps"] == result["older received"] == 0
    assert result["incarnations of the learner"] >= 2
    assert "learner killed: number" in capsys.readouterr().out


def test_a_fault_that_needs_a_disk_of_its_own_is_left_out_without_one(soak, monkeypatch):
    class Undisturbed:
        disk, chance = None, sys.modules["soak"].random.Random(0)

        def until_step(self) -> float:
            return 0.0

        def let_pass(self, seconds: float) -> None:
            return None

    for name in soak.FAULTS:
        monkeypatch.setitem(soak.FAULTS, name, lambda run: {"back": 1.0})
    done = soak.disturb(Undisturbed(), soak.FAULTS, 0.0, 1.0)
    assert {each["fault"] for each in done} == set(soak.FAULTS) - {"disk full"}
