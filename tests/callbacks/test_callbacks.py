"""Callbacks receive every row once, in order, whatever happens; tools read back what was written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from dask_isgd.callbacks import Callback
from dask_isgd.callbacks.callback import CallbackRunner, flat, require, rows
from dask_isgd.errors import MissingExtraError


def history(steps, **columns):
    columns = columns or {"loss": [1 / s for s in steps], "gain": [math.nan] * len(steps)}
    return xr.Dataset({k: ("report", v) for k, v in columns.items()}, coords={"step": ("report", [*map(float, steps)])})


NOTHING = xr.Dataset()
EVALUATED = history([0, 20], loss=[2.0, 1.0], error=[0.9, 0.1], seconds=[1.0, 2.0])


class Notes(Callback):
    def __init__(self):
        self.received = []

    def begin(self, run, settings):
        self.received.append(("begin", run, settings))

    def report(self, step, values):
        self.received.append((step, values))

    def end(self, status, summary):
        self.received.append(("end", status, summary))


class Broken(Notes):
    def report(self, step, values):
        raise OSError("the tool is gone")


def test_rows_are_finite_renamed_and_beyond_a_step():
    assert rows(history([10, 20]), 10) == [(20, {"loss": 0.05})]
    assert rows(EVALUATED, -1, {"error": "validation_error"}) == [
        (0, {"validation_error": 0.9}),
        (20, {"validation_error": 0.1}),
    ]
    assert rows(NOTHING, 0) == []


def test_each_row_is_reported_once_in_order():
    notes = Notes()
    runner = CallbackRunner([notes])
    runner.begin("abc", {"learning": {"steps": 5}})
    assert runner.due
    runner.update(history([10, 20]), EVALUATED)
    assert not runner.due
    runner.update(history([10, 20]), EVALUATED)
    runner.update(history([10, 15, 20, 30]), EVALUATED)  # restarted: step 15 was reached again
    runner.end("finished", {"gain": 2.0, "variance": {"ideal": 1.0}})
    assert notes.received == [
        ("begin", "abc", {"learning.steps": 5}),
        (0, {"validation_loss": 2.0, "validation_error": 0.9}),
        (10, {"loss": 0.1}),
        (20, {"loss": 0.05}),
        (20, {"validation_loss": 1.0, "validation_error": 0.1}),
        (30, {"loss": 1 / 30}),
        ("end", "finished", {"gain": 2.0, "variance.ideal": 1.0}),
    ]


def test_a_callback_that_fails_is_dropped_with_a_log_message(caplog):
    broken, notes = Broken(), Notes()
    runner = CallbackRunner([broken, notes])
    runner.update(history([10, 20]), NOTHING)
    assert [step for step, _ in notes.received] == [10, 20]
    assert "Broken failed and receives nothing more from this run" in caplog.text
    assert caplog.text.count("the tool is gone") >= 1
    runner.end("finished", {})
    assert broken.received == []


def test_what_is_not_installed_is_named():
    with pytest.raises(MissingExtraError, match=r"needs no_such_tool, which is not.*pip install 'dask_isgd\[extra\]'"):
        require("no_such_tool", "extra")


def test_flat():
    assert flat({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}


SETTINGS = {"learning": {"steps": 30}, "sampling": {"gate": "auto"}}
SUMMARY = {"steps": 30, "gain": 1.5, "validation_error": None, "run": "/x"}


def write(callback):
    runner = CallbackRunner([callback])
    runner.begin("abc", SETTINGS)
    runner.update(history(range(1, 2001)), EVALUATED)
    runner.end("finished", SUMMARY)
    assert runner._callbacks == [callback]  # nothing failed


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_it(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dask_isgd.callbacks import TensorBoard

    write(TensorBoard(tmp_path))
    found = EventAccumulator(str(tmp_path / "abc"), size_guidance={"scalars": 0})
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "validation_loss", "validation_error"}
    losses = found.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 2001))
    np.testing.assert_allclose([event.value for event in losses], 1 / np.arange(1, 2001), rtol=1e-6)
    assert [event.value for event in found.Scalars("validation_error")] == pytest.approx([0.9, 0.1])


@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_it(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from dask_isgd.callbacks import MLflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = (tmp_path / "mlruns").as_uri()
    callback = MLflow("digits", tracking_uri=uri)
    write(callback)
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(callback.run_id)
    assert (run.info.run_name, run.info.status) == ("abc", "FINISHED")
    assert run.data.params == {"learning.steps": "30", "sampling.gate": "auto"}
    losses = client.get_metric_history(callback.run_id, "loss")
    assert sorted(metric.step for metric in losses) == list(range(1, 2001))
    assert run.data.metrics["validation_error"] == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from dask_isgd.callbacks import WandB

    for name in ("WANDB_SILENT", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
        monkeypatch.setenv(name, "true")
    write(WandB("digits", mode="offline", dir=str(tmp_path)))
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for text in (b"validation_error", b"trained_steps", b"learning.steps"):
        assert text in content


def test_wait_reports_to_callbacks(client, digits, run_dir):
    import dask_isgd as isgd

    notes = Notes()
    learning = isgd.Learning(steps=120, batch_size=32, publish_every=20, report_every=10, evaluate_every=60, threads=1)
    model = "dask_isgd.pipelines.models:digits"
    run = isgd.fit(client, model, digits, run_dir, learning=learning, validation=digits.split("test"))
    run.wait(timeout=120, callbacks=[notes])
    (first, name, settings), *middle, (last, status, summary) = notes.received
    assert (first, last, name, status) == ("begin", "end", run.name, "finished")
    assert settings["learning.steps"] == 120
    assert summary["steps"] == 120
    assert [step for step, values in middle if "loss" in values] == list(range(10, 121, 10))
    assert next(v for s, v in middle if s == 120 and "validation_error" in v)
    again = Notes()
    isgd.attach(client, run_dir).wait(timeout=60, callbacks=[again])  # an export after the fact
    assert again.received[1:-1] == middle
