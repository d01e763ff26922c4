"""The benchmark of optimizers still runs, and its figures point where the documentation says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import optimizers


def test_sgd_takes_smaller_steps_and_adam_steps_of_the_same_size(capsys):
    found = optimizers.main(["--tiny"])
    root = optimizers.problem().gain ** 0.5
    assert found["SGD"].rms == pytest.approx(1 / root, rel=0.1)
    assert found["SGD, momentum 0.9"].rms == pytest.approx(1 / root, rel=0.2)
    assert found["Adam"].rms == pytest.approx(1.0, abs=0.15)
    assert found["Adam"].drift > 0.7 * root
    assert "| Adam |" in capsys.readouterr().out
