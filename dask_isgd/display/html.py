"""A run as HTML: a card for notebooks and a page of its own."""

from __future__ import annotations

import html as _html
from collections.abc import Mapping
from typing import Any

from dask_isgd.display.summary_table import summary_rows
from dask_isgd.display.text import DASH, measures, number


def page(run: str, summary: Mapping[str, Any], svg: str) -> str:
    """A whole HTML page of a run: its figures and a picture (SVG, trusted). Needs no other file."""
    rows = "".join(
        f"<tr><td>{_html.escape(name)}</td><td><b>{_html.escape(text)}</b></td></tr>"
        for name, text in summary_rows(summary)
    )
    drawing = svg[svg.index("<svg") :]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_html.escape(run)}</title><style>'
        "body{font-family:Helvetica,Arial,sans-serif;color:#222;max-width:1100px;margin:24px auto;padding:0 16px}"
        "td{padding:2px 20px 2px 0}td:first-child{color:#6b6b6b}svg{width:100%;height:auto}"
        f"</style></head><body><h1>{_html.escape(run)}</h1><table>{rows}</table>{drawing}</body></html>\n"
    )


_STATUS_COLOURS = {"running": "#0072B2", "finished": "#009E73", "failed": "#D55E00", "stopped": "#E69F00"}


def html(run: str, status: str, values: Mapping[str, Any]) -> str:
    """The card of a run for notebooks: static HTML, escaped, without script or outside files.

    ``values`` is ``Run.latest``. It reads as well in a saved notebook, on a dark page, and without
    any style at all.
    """
    step, steps = values.get("step") or 0, values.get("steps")
    share = min(1.0, step / steps) if steps else 0.0
    colour = _STATUS_COLOURS.get(status, "#6b6b6b")
    progress = f"step {number(step)} of {number(steps)}" if steps else f"step {number(step)}"
    gate = {1: "open", 0: "closed"}.get(values.get("gate", -1))
    shown = [*measures(values), *([("gate", gate)] if gate else [])]
    cells = "".join(
        f'<td style="text-align:left;padding:2px 18px 2px 0"><div style="opacity:.65;font-size:85%">{_html.escape(k)}'
        f"</div><div><b>{_html.escape(v)}</b></div></td>"
        for k, v in shown
        if v != DASH
    )
    return (
        '<div style="border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:10px 14px;max-width:680px">'
        f'<div><b>{_html.escape(run)}</b> &nbsp;<span style="color:{colour}">{_html.escape(status)}</span>'
        f'<span style="float:right;opacity:.75">{_html.escape(progress)}</span></div>'
        '<div style="background:rgba(128,128,128,.25);border-radius:3px;height:6px;margin:8px 0">'
        f'<div style="background:{colour};border-radius:3px;height:6px;width:{100 * share:.1f}%"></div></div>'
        f'<table style="border:none;margin:0"><tr style="background:none">{cells}</tr></table></div>'
    )
