"""The words of the dashboard: a header of figures and what has happened, as escaped HTML."""

from __future__ import annotations

import html
import math
import time

from dask_isgd.dashboard.record import RunRecord

_COLOURS = {"running": "#0072B2", "finished": "#009E73", "failed": "#D55E00", "stopped": "#9a6a00", "paused": "#9a6a00"}
_QUIET = "#6b6b6b"
NOTHING = "No run yet. Start one with <b>dask_isgd.fit</b> or <b>dask isgd train</b>; it appears here by itself."


def header(record: RunRecord | None, now: float) -> str:
    """Status and the newest figures of a run; everything in it is escaped."""
    if record is None:
        return f'<div style="font-size:14px;color:{_QUIET};padding:6px 2px">{NOTHING}</div>'
    status = record.status(now)
    latest = record.latest
    tiles = [
        ("run", record.run),
        ("step", _number(latest.get("step"), "{:,.0f}")),
        ("loss", _number(latest.get("loss"), "{:.4g}")),
        ("validation error", _number(latest.get("validation_error"), "{:.2%}").replace("%", " %")),
        ("gain", _number(latest.get("gain"), "{:.2f}×")),
        ("gate", {1.0: "open", 0.0: "closed"}.get(latest.get("gate", math.nan), "–")),
        ("steps/s", _number(latest.get("steps_per_second"), "{:,.0f}")),
        ("scored/s", _number(latest.get("scored_per_second"), "{:,.0f}")),
        ("mean age", _number(latest.get("mean_age"), "{:,.0f}")),
        ("restarts", str(max(0, int(latest.get("incarnation", 1)) - 1))),
        ("faults", str(record.faults)),
    ]
    cells = "".join(
        f'<div style="margin-right:24px"><div style="font-size:11px;color:{_QUIET}">{html.escape(name)}</div>'
        f'<div style="font-size:16px;color:#222">{html.escape(text)}</div></div>'
        for name, text in tiles
    )
    return (
        '<div style="display:flex;flex-wrap:wrap;align-items:center;padding:2px">'
        f'<div style="margin-right:28px;min-width:90px"><div style="font-size:11px;color:{_QUIET}">status</div>'
        f'<div style="font-size:16px;font-weight:bold;color:{_COLOURS.get(status, _QUIET)}">{html.escape(status)}</div>'
        f"</div>{cells}</div>"
    )


def happenings(record: RunRecord | None) -> str:
    """Faults, restarts and ends, the newest first; everything in it is escaped."""
    rows = [] if record is None else list(record.happenings)[::-1]
    title = '<div style="font-weight:bold;font-size:13px;color:#222;padding-bottom:4px">Faults and restarts</div>'
    if not rows:
        return f'{title}<div style="font-size:12px;color:{_QUIET}">none</div>'
    lines = "".join(
        f'<div style="padding:2px 0"><span style="color:{_QUIET}">'
        f"{time.strftime('%H:%M:%S', time.localtime(row.time))}</span> "
        f"<b>{html.escape(row.what)}</b> {html.escape(row.detail)}</div>"
        for row in rows
    )
    return f'{title}<div style="font-size:12px;line-height:1.35;overflow-wrap:anywhere">{lines}</div>'


def label(record: RunRecord, now: float) -> str:
    """A run in the list of runs."""
    return f"{record.run} · {record.status(now)} · step {record.latest.get('step', 0):,.0f}"


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value is not None and math.isfinite(value) else "–"
