"""What is called with the latest values of a run, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import xarray as xr

from dask_isgd.callbacks import Callback
from dask_isgd.errors import RunNotFoundError
from dask_isgd.run.progress import progress_calls

HISTORY = xr.Dataset({"loss": ("report", [2.0, 1.0])}, coords={"step": ("report", [10.0, 20.0])})


class Log(Callback):
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def begin(self, run, settings):
        self.calls.append(("begin", run))

    def report(self, step, values):
        self.calls.append(("report", step, dict(values)))

    def end(self, status, summary):
        self.calls.append(("end", status, dict(summary)))


def make_run(summary=lambda: {"steps": 20}):
    return SimpleNamespace(
        name="abc",
        document={"config": {}},
        status="finished",
        latest={"step": 20},
        history=HISTORY,
        evaluations=xr.Dataset(),
        summary=summary,
    )


def nothing_yet():
    raise RunNotFoundError("no report yet")


def test_without_progress_or_callbacks_there_is_nothing_to_call():
    with progress_calls(make_run(), False, ()) as call:
        assert call is None


def test_a_script_shows_progress_as_the_command_does(capsys):
    with progress_calls(make_run(), True, ()) as call:
        call({"step": 20, "steps": 20, "loss": 0.5})
    assert capsys.readouterr().err == "training  step 20 of 20  training loss 0.5\n"


def test_progress_alone_is_called_itself():
    with progress_calls(make_run(), print, ()) as call:
        assert call is print


@pytest.mark.parametrize(("summary", "shown"), [(lambda: {"steps": 20}, {"steps": 20}), (nothing_yet, {})])
def test_callbacks_receive_begin_every_report_and_end(summary, shown):
    log, values = Log(), []
    with progress_calls(make_run(summary), values.append, [log]) as call:
        call({"step": 10})
    assert values == [{"step": 10}]
    reports = [("report", 10, {"loss": 2.0}), ("report", 20, {"loss": 1.0})]
    assert log.calls == [("begin", "abc"), *reports, ("end", "finished", shown)]


def test_callbacks_end_after_an_error_too():
    log = Log()
    with pytest.raises(KeyboardInterrupt), progress_calls(make_run(), False, [log]):
        raise KeyboardInterrupt
    assert log.calls[-1] == ("end", "finished", {"steps": 20})
