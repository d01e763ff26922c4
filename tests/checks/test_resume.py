"""What keeps a run from being resumed is said before the cluster is used."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL

import dask_isgd as isgd
from dask_isgd.checks.request import PreparedRun, RunRequest, begin, create, prepare
from dask_isgd.core import models
from dask_isgd.core.loss import cross_entropy
from dask_isgd.errors import CheckpointError, RunMismatchError
from dask_isgd.learner.trainer import Trainer


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


def prepared(digits, run_dir, **changes) -> PreparedRun:
    learning = isgd.Learning(**{"steps": 100, "batch_size": 8, **changes})
    resume = (run_dir / "run.json").exists()
    return prepare(RunRequest(model=MODEL, data=digits, run_dir=run_dir, learning=learning, resume=resume))


@pytest.fixture
def run(digits, run_dir) -> PreparedRun:
    """A run whose latest checkpoint is of step 50."""
    plan = prepared(digits, run_dir)
    create(plan)
    trainer = Trainer(models.build(MODEL), cross_entropy, plan.spec.learning)
    state = {"run": plan.spec.run, "trainer": trainer.state()}
    plan.spec.directory.checkpoints().commit(50, 1, {}, state)
    return plan


def test_the_same_settings_resume(run, digits, run_dir):
    for changes in ({}, {"steps": 50}, {"learning_rate": 0.3}, {"batch_size": 16}, {"scheduler": "cosine"}):
        assert prepared(digits, run_dir, **changes).resume


def test_what_changed_is_said(run, digits, run_dir, caplog):
    prepared(digits, run_dir)
    assert not caplog.records
    prepared(digits, run_dir, batch_size=16, learning_rate=0.3)
    wanted = (
        "run resumes with other settings than before: Learning.batch_size: 8 → 16; Learning.learning_rate: 0.05 → 0.3"
    )
    assert wanted in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 49}, "got 49, and the run has made 50 steps already; wanted at least as many"),
        ({"optimizer": adam}, "Learning.optimizer: the run has groups of .* with .*nesterov.*, these are of .*amsgrad"),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 5)}, "Learning.scheduler: the run has none"),
    ],
)
def test_what_does_not_fit_is_named(run, digits, run_dir, changes, message):
    with pytest.raises(RunMismatchError, match=f"(?s){message}"):
        prepared(digits, run_dir, **changes)


def test_no_checkpoint_that_verifies_is_no_reason_to_begin_again(run, digits, run_dir):
    (run_dir / "checkpoints" / "step-000000050-i0001" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* verifies .*delete that folder to begin again"):
        prepared(digits, run_dir)


def test_checkpoints_of_a_run_that_was_overwritten_do_not_count(run, digits, run_dir):
    run.spec.directory.checkpoints().commit(70, 1, {}, {"run": "another"})
    assert run.spec.directory.checkpoints().latest(run.spec.run).step == 50
    assert prepared(digits, run_dir, steps=60).resume


def test_what_a_client_left_half_created_is_completed(digits, run_dir):
    plan = prepared(digits, run_dir)
    directory = plan.spec.directory
    directory.create(plan.document)  # and the client dies
    again = prepared(digits, run_dir)
    begin(again)
    weights = directory.open_weights()
    assert (weights.n, weights.chunk_size) == (len(digits), plan.spec.chunk)
    assert directory.control() == {"want": "run", "attempt": again.spec.attempt}


def test_the_number_of_a_start_is_above_any_before_even_if_a_clock_was_ahead(run, digits, run_dir):
    run.spec.directory.set_control(attempt=10**17)
    assert prepared(digits, run_dir).spec.attempt == 10**17 + 1
    (run_dir / "control.json").write_bytes(b"damaged")
    assert 0 < prepared(digits, run_dir).spec.attempt < 10**17
