"""The text of the dashboard's pages: a header of figures and the log of events, as escaped HTML."""

from __future__ import annotations

import time

from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.display.render import render
from dask_isgd.display.text import DASH, figures, steps_of, time_left

_COLOURS = {"running": "#0072B2", "finished": "#009E73", "failed": "#D55E00", "stopped": "#9a6a00", "paused": "#9a6a00"}
_OTHER = "#767676"


def header(record: RunRecord | None, now: float) -> str:
    """Return the status and the latest figures of a run."""
    if record is None:
        return render("no_run")
    status, latest = record.status(now), record.latest
    shown = [
        ("run", record.name),
        ("step", steps_of(latest).removeprefix("step ")),
        *([("time left", left)] if status == "running" and (left := time_left(latest)) != DASH else []),
        *((name, text) for name, text in figures(latest, more=True) if text != DASH),
        ("restarts", str(max(0, int(latest.get("incarnation", 1)) - 1))),
        ("faults", str(record.faults)),
    ]
    return render("header", status=status, colour=_COLOURS.get(status, _OTHER), figures=shown)


def line(record: RunRecord | None, now: float) -> str:
    """Return the run, its status and its step in one line."""
    if record is None:
        return render("no_run")
    status = record.status(now)
    colour = _COLOURS.get(status, _OTHER)
    return render("run_line", name=record.name, status=status, colour=colour, steps=steps_of(record.latest))


def event_log(record: RunRecord | None) -> str:
    """Return faults, restarts and ends, the latest first."""
    rows = [] if record is None else list(record.log)[::-1]
    entries = [(time.strftime("%H:%M:%S", time.localtime(row.time)), row.what, row.detail) for row in rows]
    return render("event_log", entries=entries)


def label(record: RunRecord, now: float) -> str:
    """Return a run's entry in the list of runs."""
    return f"{record.name} · {record.status(now)} · {steps_of(record.latest)}"
