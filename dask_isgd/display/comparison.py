"""Several runs in one figure: each panel shows them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dask_isgd.columns import label
from dask_isgd.display.plots import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    NotebookFigure,
    count_axis,
    draw_curve,
    frame,
    log_axis,
    values_of,
)
from dask_isgd.extras import needs

with needs("plot", "a comparison of runs"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
_STYLES = ("-", "--", ":", "-.")

Columns = Mapping[str, Any]


def plot_runs(runs: Mapping[str, tuple[Columns, Columns]]) -> Figure:
    """Return training loss and validation error (without classes: loss) of runs, over steps and over time.

    ``runs``: history and evaluations by name, as ``plot`` takes them.
    """
    figure = NotebookFigure(figsize=(11, 7.2), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    classes = any(np.isfinite(values_of(each, "error")).any() for _, each in runs.values())
    validation = "error" if classes else "loss"
    lower = label("validation_error" if classes else "validation_loss")
    for column, x in enumerate(("step", "seconds")):
        frame(axes[0, column], f"{label('loss').capitalize()}, by {'steps' if x == 'step' else 'time'}")
        frame(axes[1, column], f"{lower.capitalize()}, by {'steps' if x == 'step' else 'time'}")
        count_axis(axes[1, column].xaxis, 6)
        axes[1, column].set_xlabel("step" if x == "step" else "seconds of training", color=MUTED)
        for number, (name, (history, evaluations)) in enumerate(runs.items()):
            look = {"color": _COLOURS[number % len(_COLOURS)], "style": _STYLES[number % len(_STYLES)], "label": name}
            steps, at = values_of(history, "step"), values_of(history, x)
            draw_curve(axes[0, column], at, values_of(history, "loss"), **look)
            evaluated = np.interp(values_of(evaluations, "step"), np.append(0.0, steps), np.append(0.0, at))
            _points(axes[1, column], evaluated, values_of(evaluations, validation), **look)
    for row, left in enumerate(axes[:, 0]):
        if classes and row == 1:
            left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        values = [line.get_ydata() for line in left.lines]
        log_axis(left, np.concatenate(values) if values else np.zeros(0), percent=classes and row == 1)
    axes[0, 0].legend(frameon=False, fontsize=8.5, loc="best", handlelength=2.4)
    return figure


def _points(axes: Axes, x: Any, y: Any, *, color: str, style: str, label: str) -> None:
    kept = np.isfinite(x) & np.isfinite(y)
    marker = "o" if kept.sum() < 40 else None
    axes.plot(x[kept], y[kept], color=color, linestyle=style, marker=marker, markersize=3.5, label=label)
