"""A run as HTML: a card for notebooks, and a page for a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from dask_isgd.display.render import render
from dask_isgd.display.summary_table import legend, summary_rows
from dask_isgd.display.text import DASH, figures, steps_of, time_left

_COLOURS = {"running": "#0072B2", "finished": "#009E73", "failed": "#D55E00", "stopped": "#E69F00"}


def page(run: str, summary: Mapping[str, Any], svg: str) -> str:
    """Return an HTML page of a run: its summary and a plot (SVG, not escaped). It needs no other file."""
    return render(
        "page", run=run, rows=summary_rows(summary), legend=legend(summary), picture=Markup(svg[svg.index("<svg") :])
    )


def card(run: str, status: str, values: Mapping[str, Any]) -> str:
    """Return the card of a run for notebooks: static HTML without scripts or external files.

    ``values`` is ``Run.latest``. The card is as readable in a saved notebook, on a dark page, and
    without any style.
    """
    step, steps = values.get("step") or 0, values.get("steps")
    left = time_left(values) if status == "running" else DASH
    return render(
        "card",
        run=run,
        status=status,
        colour=_COLOURS.get(status, "#6b6b6b"),
        progress=steps_of(values) + (f", {left} left" if left != DASH else ""),
        percent=100 * min(1.0, step / steps) if steps else 0.0,
        figures=[(name, text) for name, text in figures(values, more=True) if text != DASH],
    )
