"""Faults 1 and 4: a learner that is killed continues from its newest checkpoint, however often."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    OPEN,
    WAIT,
    committed,
    fit,
    holder,
    kill,
    learning,
    lowest_step,
    no_gaps,
    reaches,
    saved,
    state,
    until,
)

pytestmark = pytest.mark.cluster

PROMISE = 5.0
"""Seconds from a kill to the first report of the successor; asserted five times over on a busy machine."""


def test_a_killed_learner_is_back_and_loses_the_steps_since_its_checkpoint(client, digits, run_dir, capsys):
    run = fit(client, digits, run_dir)
    until(run, saved(run))
    kept = committed(run)
    kill(holder(run)["pid"])
    seconds = until(run, lambda latest: latest["incarnation"] == 2 and latest["step"] > kept)
    with capsys.disabled():
        print(f"\nlearner killed: back after {seconds:.1f} s")
    assert seconds < 5 * PROMISE
    assert lowest_step(run, 2) >= kept > 0
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)


def test_the_killed_exact_run_is_bitwise_the_uninterrupted_one(client, digits, tmp_path):
    """With a rate that follows a cosine and the measured gain, which the successor has to know as well."""
    rates = {"scheduler": "cosine", "learning_rate_gain": True}
    settings = learning(steps=160, synchronous=True, checkpoint_steps=1, **rates)
    whole = fit(client, digits, tmp_path / "whole", learning=settings)
    whole.wait(timeout=WAIT)
    broken = fit(client, digits, tmp_path / "broken", learning=settings)
    until(broken, reaches(40))
    kill(holder(broken)["pid"])
    broken.wait(timeout=WAIT)
    assert broken.latest["incarnation"] == 2
    assert state(broken) == state(whole)
    history = whole.history
    cosine = history.learning_rate[0] * (1 + np.cos(np.pi * history.step / 160)) / 2
    assert (history.learning_rate[:-1] > 1.1 * cosine[:-1]).any(), "the gain was followed"


@pytest.mark.parametrize("role", ["coordinator"])
def test_a_killed_coordinator_is_back(client, digits, run_dir, role):
    run = fit(client, digits, run_dir)
    until(run, lambda latest: latest.get("examples_scored", 0) > 0)
    kill(holder(run, role)["pid"])
    before = run.latest["examples_scored"]
    until(run, lambda latest: run.directory.leases(role).highest() == 2)
    until(run, lambda latest: 0 < latest["examples_scored"] != before)
    assert run.stop(timeout=WAIT) == "stopped"
    assert run.directory.leases("learner").highest() == 1
    no_gaps(run)


@pytest.mark.slow  # eleven starts of a process that imports torch
def test_ten_deaths_of_the_learner_are_no_reason_to_give_up(client, digits, run_dir, capsys):
    run = fit(client, digits, run_dir, sampling=OPEN)
    times = []
    for death in range(1, 11):
        until(run, reaches(committed(run) + 20, incarnation=death))
        kill(holder(run)["pid"])
        times.append(until(run, lambda latest, death=death: latest["incarnation"] > death))
    with capsys.disabled():
        print(f"\nten deaths: back after {min(times):.1f} to {max(times):.1f} s")
    until(run, reaches(committed(run) + 20, incarnation=11))
    assert run.stop(timeout=WAIT) == "stopped"
    no_gaps(run)
