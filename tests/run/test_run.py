"""A run on a cluster of processes keeps its promises."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import MODEL
from distributed import Client

import dask_isgd as isgd
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.loss import cross_entropy
from dask_isgd.display.summary_table import summary_rows
from dask_isgd.display.text import figures_line
from dask_isgd.errors import ConfigError, RunExistsError, RunMismatchError
from dask_isgd.norms import NormEngine
from dask_isgd.run.summary import summarise
from dask_isgd.storage import Dataset, WeightArray

WAIT = 120
CLOCKS = {"seconds", "steps_per_second"}


def learning(**changes) -> isgd.Learning:
    settings = {"steps": 600, "batch_size": 32, "publish_every": 20, "report_every": 10, "evaluate_every": 100}
    return isgd.Learning(**{**settings, "threads": 1, **changes})


OPEN = isgd.Sampling(gate="open")


@pytest.fixture(scope="module")
def trained(client: Client, digits: Dataset, tmp_path_factory) -> isgd.Run:
    """A finished run; ``lines`` has what its progress was called with, ``returned`` what ``wait`` returned."""
    run = isgd.fit(
        client,
        MODEL,
        digits,
        tmp_path_factory.mktemp("trained") / "run",
        learning=learning(steps=1500),
        sampling=OPEN,
        validation=digits.split("test"),
    )
    run.lines = []
    run.returned = run.wait(timeout=WAIT, progress=run.lines.append)
    return run


def test_the_last_line_and_the_table_agree_on_every_figure(trained):
    summary, last = trained.returned, trained.lines[-1]
    assert last["status"] == "finished"
    assert (last["step"], last["loss"], last["evaluated"]) == (1500, summary["train_loss"], 1500)
    for name in ("gain", "noise_scale", "steps_per_second", "validation_error", "validation_loss"):
        assert last.get(name) == summary[name], name
    assert {**trained.latest, "status": "finished"} == last
    rows, line = dict(summary_rows(summary)), figures_line(last)
    for name in ("training loss", "validation error", "gain", "steps per second"):
        assert f"{name} {rows[name]}" in line


def scored_events(client: Client, run: isgd.Run) -> list[tuple[int, int]]:
    events = client.get_events(f"isgd-{run.id}")
    return [(chunk, version) for _, e in events if e["kind"] == "scored" for chunk, _, version in e["chunks"]]


def test_every_chunk_is_scored_at_several_versions_that_grow(trained, client):
    pairs = scored_events(client, trained)
    chunks = WeightArray.open(trained.directory.weights).n_chunks
    for chunk in range(chunks):
        versions = [v for c, v in pairs if c == chunk]
        assert len(set(versions)) >= 3
        assert versions == sorted(versions)


def test_the_stamps_are_those_of_the_last_scores(trained, client):
    weights = WeightArray.open(trained.directory.weights)
    last = dict(scored_events(client, trained))
    assert weights.read_stamps()[:, 0].tolist() == [last[chunk] for chunk in range(weights.n_chunks)]
    assert np.isfinite(weights.read_all()).all()


def test_a_figure_that_is_not_known_is_none(trained):
    assert trained.summary()["examples_scored"] > 0
    assert summarise(trained.directory)["examples_scored"] is None, "the directory does not say"


def test_importance_sampling_pays_on_the_digits(trained):
    late = trained.history.isel(report=slice(-30, None)).mean()
    assert late.variance_ideal <= late.variance_stale < 0.7 * late.variance_uniform


def test_the_digits_are_learned(trained):
    assert trained.summary()["validation_error"] < 0.04
    assert trained.evaluations.step[-1] == 1500


def test_history_is_one_row_a_report(trained):
    assert isinstance(trained.history, xr.Dataset)
    assert trained.history.step.values.tolist() == list(range(10, 1501, 10))


def test_the_model_comes_back_with_the_parameters_of_the_last_step(trained, digits):
    rows = digits.split("test").load()
    inputs, targets = Prepare(digits, torch.device("cpu"))(rows.inputs, rows.target)
    wrong = (trained.model()(*inputs).argmax(1) != targets).float().mean()
    assert float(wrong) == pytest.approx(trained.summary()["validation_error"])


def test_attach_finds_the_run_and_says_what_the_model_needs(trained, client):
    again = isgd.attach(client, trained.directory.url)
    assert again.status == "finished"
    assert again.summary()["steps"] == 1500
    with pytest.raises(ConfigError, match="pass it: attach"):
        again.model()


def test_a_taken_directory_is_refused(trained, client, digits):
    with pytest.raises(RunExistsError, match=r"resume=True.*overwrite=True"):
        isgd.fit(client, MODEL, digits, trained.directory.url, learning=learning())


def test_other_data_or_another_model_cannot_resume(trained, client, digits):
    with pytest.raises(RunMismatchError, match=r"model\.signature"):
        isgd.fit(client, other_model, digits, trained.directory.url, learning=learning(), resume=True)
    with pytest.raises(RunMismatchError, match=r"data\."):
        isgd.fit(client, MODEL, digits.split("test"), trained.directory.url, learning=learning(), resume=True)


def other_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_a_score_is_computed_with_bitwise_the_published_parameters(client, digits, run_dir):
    """The weights stamped with version v equal those recomputed from the checkpoint of step v."""
    run = isgd.fit(
        client, MODEL, digits, run_dir, learning=learning(steps=60, synchronous=True, checkpoint_steps=1), sampling=OPEN
    )
    run.wait(timeout=WAIT)
    weights = WeightArray.open(run.directory.weights)
    boundary = next(name for name in run.directory.checkpoints().names() if name.startswith("step-000000040"))
    found = run.directory.checkpoints().load(boundary)
    assert (weights.read_stamps()[:, 0] == found.step).all()
    model = models.build(MODEL)
    tensors = models.from_arrays(found.tensors, found.state["dtypes"])
    models.load(model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    prepare, engine = Prepare(digits, torch.device("cpu")), NormEngine(model, cross_entropy)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for chunk in range(weights.n_chunks):
            rows = digits.read(*weights.bounds(chunk))
            inputs, targets = prepare(rows.inputs, rows.target)
            assert np.array_equal(engine(inputs[0], targets)[0].numpy(), weights.read(chunk))
    finally:
        torch.set_num_threads(threads)


def parameters_and_history(run: isgd.Run) -> tuple[dict[str, str], dict[str, str]]:
    """Digests: whoever compares them reads names, not megabytes."""
    found = run.directory.checkpoints().latest()
    history = run.history.load()
    return (
        {name: digest(array) for name, array in found.tensors.items()},
        {name: digest(history[name].values) for name in history.data_vars if name not in CLOCKS},
    )


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    "sampling", [OPEN, isgd.Sampling(), isgd.Sampling(uniform=True)], ids=["open", "auto", "uniform"]
)
def test_exact_runs_of_one_seed_are_the_same_bits(client, digits, tmp_path, sampling):
    ends = []
    for name in ("first", "second"):
        run = isgd.fit(
            client, MODEL, digits, tmp_path / name, learning=learning(steps=120, synchronous=True), sampling=sampling
        )
        run.wait(timeout=WAIT)
        ends.append(parameters_and_history(run))
    assert ends[0] == ends[1]


def test_a_resumed_exact_run_is_the_uninterrupted_one(client, digits, tmp_path):
    whole = isgd.fit(
        client, MODEL, digits, tmp_path / "whole", learning=learning(steps=200, synchronous=True), sampling=OPEN
    )
    whole.wait(timeout=WAIT)
    settings = learning(steps=200, synchronous=True, checkpoint_steps=1)
    part = isgd.fit(client, MODEL, digits, tmp_path / "part", learning=settings, sampling=OPEN)
    wait_for(part, lambda latest: latest["step"] >= 20)
    part.stop(timeout=WAIT)
    resumed = isgd.fit(client, MODEL, digits, tmp_path / "part", learning=settings, sampling=OPEN, resume=True)
    resumed.wait(timeout=WAIT)
    a, b = parameters_and_history(whole), parameters_and_history(resumed)
    assert a[0] == b[0]
    assert a[1] == b[1]


def test_scores_of_steps_that_were_lost_are_no_part_of_an_exact_run(client, digits, tmp_path):
    """The array holds the weights of step 40, the scheduler still tells that they are those of step 0."""
    settings = learning(steps=60, synchronous=True, checkpoint_steps=1)
    ends = []
    for name in ("whole", "broken"):
        run = isgd.fit(client, MODEL, digits, tmp_path / name, learning=settings, sampling=OPEN)
        run.wait(timeout=WAIT)
        ends.append(parameters_and_history(run))
    checkpoints = run.directory.checkpoints()
    for name in checkpoints.names():
        checkpoints.folder.remove(name)
    resumed = isgd.fit(client, MODEL, digits, tmp_path / "broken", learning=settings, sampling=OPEN, resume=True)
    resumed.wait(timeout=WAIT)
    assert parameters_and_history(resumed) == ends[0]


def test_uniform_takes_equal_steps_and_scores_nothing(client, digits, run_dir):
    client.get_task_stream(count=1)
    run = isgd.fit(
        client,
        MODEL,
        digits,
        run_dir,
        learning=learning(steps=200),
        sampling=isgd.Sampling(uniform=True),
        validation=digits.split("test"),
    )
    summary = run.wait(timeout=WAIT)
    assert summary["steps"] == 200
    done = [str(record["key"]) for record in client.get_task_stream(count=10_000)]
    assert any("evaluate-" + run.id in key for key in done)
    assert not any("score-" + run.id in key for key in done)
    assert np.isnan(WeightArray.open(run.directory.weights).read_stamps()).all()


def test_pause_holds_unpause_goes_on_stop_leaves_a_checkpoint_to_resume_from(client, digits, run_dir):
    endless = learning(steps=1_000_000)
    run = isgd.fit(client, MODEL, digits, run_dir, learning=endless, sampling=OPEN)
    wait_for(run, lambda latest: latest["step"] > 0)
    run.pause()
    wait_for(run, lambda latest: run.status == "paused" and run.directory.checkpoints().names())
    held = run.directory.checkpoints().latest().step
    run.unpause()
    wait_for(run, lambda latest: latest["step"] > held + 10)
    assert run.stop(timeout=WAIT) == "stopped"
    stopped = run.directory.checkpoints().latest().step
    assert stopped > held
    more = learning(steps=stopped + 50)
    again = isgd.fit(client, MODEL, digits, run_dir, learning=more, sampling=OPEN, resume=True)
    assert again.wait(timeout=WAIT)["steps"] == stopped + 50
    steps = again.history.step.values
    assert (np.diff(steps) > 0).all()


def wait_for(run: isgd.Run, condition, timeout: float = WAIT) -> None:
    assert any(condition(latest) for latest in run.watch(timeout))
