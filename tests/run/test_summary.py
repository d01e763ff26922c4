"""The summary of a run, from directories that hold more or less of one."""

from __future__ import annotations

import math

import pytest

from dask_isgd.errors import RunNotFoundError
from dask_isgd.run.summary import final_values, summarise
from dask_isgd.storage import History, RunDirectory

COLUMNS = ("seconds", "loss", "gain", "variance_ideal", "variance_stale", "variance_uniform", "mean_gradient_sq_norm")


def make_run(folder, *, rows: int, uniform: bool = False, errors: tuple[float, ...] = (), **values) -> RunDirectory:
    """A run with a report every 10 steps, in which the loss of report i is i."""
    directory = RunDirectory(folder)
    directory.create({"run": "abc", "config": {"sampling": {"uniform": uniform}}})
    if rows:
        history = History.create(directory.history, "learner-0001", COLUMNS, rows)
        for i in range(rows):
            history.append({"step": 10.0 * (i + 1), "seconds": float(i + 1), "loss": float(i), "gain": 2.0, **values})
        history.flush()
    if errors:
        evaluations = History.create(directory.history, "evaluation-0001", ("loss", "error"), len(errors))
        for i, error in enumerate(errors):
            evaluations.append({"step": 10.0 * (i + 1), "loss": 1.0, "error": error})
        evaluations.flush()
    return directory


@pytest.mark.parametrize(
    ("rows", "train_loss"),
    [
        (1, 0.0),  # at least one report counts
        (9, 8.0),
        (20, 18.5),  # the last tenth: reports 18 and 19
        (30, 28.0),
    ],
)
def test_the_training_loss_is_the_mean_of_the_last_tenth_of_the_reports(tmp_path, rows, train_loss):
    assert summarise(make_run(tmp_path / "r", rows=rows))["train_loss"] == pytest.approx(train_loss)


def test_steps_time_and_rate_are_those_of_the_last_report(tmp_path):
    summary = summarise(make_run(tmp_path / "r", rows=30))
    assert (summary["steps"], summary["seconds"], summary["steps_per_second"]) == (300, 30.0, 10.0)


def test_the_validation_error_is_that_of_the_last_evaluation(tmp_path):
    assert summarise(make_run(tmp_path / "r", rows=2, errors=(0.5, 0.25)))["validation_error"] == 0.25


def test_what_a_run_that_has_ended_is_shown_with(tmp_path):
    summary = summarise(make_run(tmp_path / "r", rows=30, errors=(0.5, 0.25)))
    assert final_values(summary) == {
        "step": 300,
        "loss": 28.0,
        "validation_error": 0.25,
        "validation_loss": 1.0,
        "evaluated": 20,
        "gain": 2.0,
        "noise_scale": None,  # not known, so that no older figure is shown in its place
        "steps_per_second": 10.0,
    }


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_a_value_that_is_not_known_is_none(tmp_path, unknown):
    summary = summarise(make_run(tmp_path / "r", rows=2, gain=unknown))
    assert summary["gain"] is None
    assert summary["validation_error"] is None
    assert (summary["noise_scale"], summary["batch_size"]) == (None, None)
    assert summary["variance"] == {"ideal": None, "stale": None, "uniform": None}


@pytest.mark.parametrize(("square", "scale"), [(0.25, 32.0), (-0.25, None), (math.nan, None)])
def test_the_noise_scale_is_the_ratio_of_means_if_the_mean_gradient_can_be_told_from_noise(tmp_path, square, scale):
    run = make_run(tmp_path / "r", rows=20, variance_uniform=8.0, mean_gradient_sq_norm=square)
    assert summarise(run)["noise_scale"] == scale


@pytest.mark.parametrize(
    ("uniform", "reported", "scored", "sampling"),
    [(False, None, None, "importance"), (False, 7, 7, "importance"), (True, None, 0, "uniform")],
)
def test_examples_scored(tmp_path, uniform, reported, scored, sampling):
    summary = summarise(make_run(tmp_path / "r", rows=1, uniform=uniform), reported)
    assert (summary["examples_scored"], summary["sampling"]) == (scored, sampling)


def test_a_run_without_a_report_or_a_checkpoint_has_no_summary(tmp_path):
    with pytest.raises(RunNotFoundError, match="no report and no checkpoint yet; wait for the first one"):
        summarise(make_run(tmp_path / "r", rows=0))
