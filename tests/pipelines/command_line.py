"""How tests call a command, and a run directory for it to read."""

from __future__ import annotations

from click.testing import CliRunner

from dask_isgd.pipelines.cli import isgd
from dask_isgd.storage import History, RunDirectory


def invoke(*arguments):
    return CliRunner().invoke(isgd, [str(a) for a in arguments])


def make_run(folder, *, rows=30):
    directory = RunDirectory(folder)
    directory.create({"run": "abc", "config": {"learning": {"steps": 600}, "sampling": {"uniform": False}}})
    columns = ["seconds", "loss", "gain", "variance_ideal", "variance_stale", "variance_uniform", "gate", "mean_age"]
    history = History.create(directory.history, "learner-0001", columns, max(rows, 1))
    for i in range(rows):
        values = {"seconds": i / 10, "loss": 2 / (i + 1), "gain": 1.5, "gate": 1.0, "mean_age": 20.0}
        traces = {"variance_ideal": 1.0, "variance_stale": 4.0, "variance_uniform": 9.0}
        history.append({"step": 20.0 * (i + 1), **values, **traces})
    history.flush()
    return directory
