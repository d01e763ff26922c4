"""Plots of a run: training loss, validation error, variance, and the gain of importance sampling.

Figures are made without pyplot, so there is no window and no global state; this is safe in threads and on servers.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.columns import label
from dask_isgd.display.smoothing import smooth
from dask_isgd.display.ticks import log_ticks
from dask_isgd.extras import needs

with needs("plot", "a plot"):
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

Array = NDArray[np.float64]

# Okabe and Ito's palette: distinguishable with all common kinds of colour vision, and in grey.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, MUTED, GRID, SHADE = "#222222", "#6b6b6b", "#e6e6e6", "#ececec"
ROUND = (1, 2, 2.5, 5, 10)
"""Ticks lie at multiples of these times a power of ten."""


class NotebookFigure(Figure):
    """A figure that shows itself in a notebook, with or without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def plot(history: Any, evaluations: Any = None, title: str = "") -> Figure:
    """Return a figure of four panels over the steps of a run.

    ``history`` maps names to columns along ``report`` (``Run.history``), ``evaluations`` does so for ``step``, ``loss``
    and ``error`` (``Run.evaluations``): ``xarray.Dataset``, or any mapping of arrays. Missing variables and NaN leave
    gaps, and panels without data state that: a run can be plotted from its first second.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04, wspace=0.04)
    figure = NotebookFigure(figsize=(11, 7.2), dpi=120, layout=layout, facecolor="white")
    grid = figure.add_gridspec(6, 2)  # of one grid, so that all panels of a column have the same edges
    step = values_of(history, "step")
    order = np.argsort(step[np.isfinite(step)], kind="stable")

    def column(name: str) -> Array:
        values = values_of(history, name)
        return values[np.isfinite(step)][order] if len(values) == len(step) else np.full(len(order), np.nan)

    steps = column("step")
    losses = figure.add_subplot(grid[:3, 0])
    _loss(losses, steps, column("loss"))
    _error(figure.add_subplot(grid[:3, 1], sharex=losses), evaluations)
    _variance(figure.add_subplot(grid[3:, 0], sharex=losses), steps, column)
    gain = figure.add_subplot(grid[3:5, 1], sharex=losses)
    age = figure.add_subplot(grid[5, 1], sharex=losses)
    gain.tick_params(labelbottom=False)
    _gain(gain, steps, column)
    _age(age, steps, column)
    for axes in figure.axes:
        count_axis(axes.xaxis, 6)
    if len(steps):
        losses.set_xlim(0, max(float(steps[-1]), 1.0))
    for axes in (figure.axes[2], age):
        axes.set_xlabel("step", color=MUTED)
    if title:
        figure.suptitle(title, parse_math=False, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def values_of(dataset: Any, name: str) -> Array:
    """Return a column, or an empty one if there is none."""
    if dataset is None or name not in dataset:
        return np.zeros(0)
    return np.asarray(dataset[name], dtype=np.float64)


def _width(n: int) -> int:
    return max(1, n // 25)


def frame(axes: Axes, title: str) -> None:
    """Give a panel its title and the look of all panels."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b0b0b0")
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def count_axis(axis: Axis, most: int) -> None:
    """Label an axis with at most so many round whole numbers."""
    axis.set_major_locator(MaxNLocator(most, integer=True, steps=ROUND))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=9)
    axes.set_yticks([])
    axes.grid(False)


def log_axis(axes: Axes, values: Array, *, percent: bool = False) -> None:
    """Make the axis logarithmic, with a few plain labels, if the values span more than a factor of 4."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) < 2 or positive.max() / positive.min() < 4:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(positive.min(), positive.max())))
    axes.yaxis.set_minor_locator(NullLocator())
    unit = (100, "%") if percent else (1, "")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{unit[0] * value:,g}{unit[1]}"))


def draw_curve(axes: Axes, x: Array, y: Array, color: str, style: Any = "-", **options: Any) -> Array:
    """Draw the raw values faintly and the smoothed ones strongly; return the smoothed ones."""
    smoothed = smooth(y, _width(len(y)))
    if len(y) > 50:
        axes.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
    axes.plot(x, smoothed, color=color, linewidth=1.9, linestyle=style, **options)
    return smoothed


def _loss(axes: Axes, x: Array, y: Array) -> None:
    frame(axes, label("loss").capitalize())
    if not np.isfinite(y).any():
        return _empty(axes, "no report yet")
    smoothed = draw_curve(axes, x, y, BLUE)
    log_axis(axes, smoothed)
    # Occasionally a minibatch has almost no loss; on a logarithmic axis it would flatten everything else.
    if axes.get_yscale() == "log":
        low, high = np.nanmin(smoothed[smoothed > 0]), np.nanmax(y)
        axes.set_ylim(low / 1.6, high * 1.15)
    return None


def _error(axes: Axes, evaluations: Any) -> None:
    frame(axes, label("validation_error").capitalize())
    x, y = values_of(evaluations, "step"), values_of(evaluations, "error")
    keep = np.isfinite(x) & np.isfinite(y) if len(x) == len(y) else np.zeros(len(x), dtype=bool)
    if not keep.any():  # no classes, or nothing evaluated
        return _validation_loss(axes, x, values_of(evaluations, "loss"))
    x, y = x[keep], y[keep]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    axes.plot(x, y, color=RED, linewidth=1.9, marker="o" if len(x) < 40 else None, markersize=3.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    log_axis(axes, y, percent=True)
    best = int(np.argmin(y))
    axes.plot(x[best], y[best], "o", color=RED, markersize=7, markerfacecolor="white", markeredgewidth=1.8)
    axes.text(
        0.98,
        0.95,
        f"best {100 * y[best]:.2f} % at step {x[best]:,.0f}\nlast {100 * y[-1]:.2f} %",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=8.5,
        color=INK,
        linespacing=1.5,
    )
    return None


def _validation_loss(axes: Axes, x: Array, y: Array) -> None:
    keep = np.isfinite(x) & np.isfinite(y) if len(x) == len(y) else np.zeros(len(x), dtype=bool)
    if not keep.any():
        return _empty(axes, "no evaluation yet")
    axes.set_title(label("validation_loss").capitalize(), loc="left", fontsize=10.5, color=INK, pad=8)
    order = np.argsort(x[keep], kind="stable")
    axes.plot(x[keep][order], y[keep][order], color=RED, linewidth=1.9, marker="o" if keep.sum() < 40 else None, ms=3.5)
    log_axis(axes, y[keep])
    return None


def _variance(axes: Axes, x: Array, column: Callable[[str], Array]) -> None:
    frame(axes, "Spread of the gradient, √Tr Σ of one draw")
    shown = []
    with np.errstate(invalid="ignore"):
        for name, color, style in (
            ("variance_uniform", ORANGE, "--"),
            ("variance_stale", BLUE, "-"),
            ("variance_ideal", GREEN, ":"),
        ):
            trace = column(name)
            if np.isfinite(trace).any():
                # The estimates of a trace are unbiased, so some are negative: average first, then take the root.
                smoothed = np.sqrt(smooth(trace, _width(len(trace))))
                raw = np.sqrt(trace)
                if len(raw) > 50:
                    axes.plot(x, raw, color=color, alpha=0.18, linewidth=0.8)
                axes.plot(x, smoothed, color=color, linewidth=1.9, linestyle=style, label=label(name))
                shown.append(smoothed)
    if not shown:
        return _empty(axes, "no norms yet")
    values = np.concatenate(shown)
    log_axis(axes, values)
    if axes.get_yscale() == "log" and (values > 0).any():
        axes.set_ylim(np.nanmin(values[values > 0]) / 1.7, np.nanmax(values) * 1.7)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best", handlelength=2.4)
    return None


def _gain(axes: Axes, x: Array, column: Callable[[str], Array]) -> None:
    frame(axes, "Gain over uniform draws")
    gain, gate = column("gain"), column("gate")
    if not np.isfinite(gain).any():
        return _empty(axes, "uniform draws: nothing to compare" if len(gain) else "no report yet")
    closed = gate == 0
    # Spans in which the gate was closed; a report holds for the steps up to the next one.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], closed, [False]]).astype(int)))
    for number, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        left = 0.0 if start == 0 else x[start]
        right = x[min(end, len(x) - 1)]
        axes.axvspan(left, right, color=SHADE, linewidth=0, label="gate closed: uniform draws" if number == 0 else None)
    smoothed = draw_curve(axes, x, gain, PURPLE)
    axes.axhline(1.0, color=MUTED, linewidth=1.0, linestyle="--")
    finite = np.concatenate([smoothed[np.isfinite(smoothed)], [1.0]])
    margin = max(0.15 * np.ptp(finite), 0.1)
    axes.set_ylim(max(0.0, finite.min() - margin), finite.max() + 2 * margin)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    if closed.any():
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper right")
    return None


def _age(axes: Axes, x: Array, column: Callable[[str], Array]) -> None:
    frame(axes, "")
    age, size = column("mean_age"), column("ess_fraction")
    if not (np.isfinite(age).any() or np.isfinite(size).any()):
        return _empty(axes, "no weights")
    draw_curve(axes, x, age, BLUE)
    axes.set_ylim(bottom=0)
    count_axis(axes.yaxis, 3)
    axes.set_title(f"{label('mean_age').capitalize()}, steps", loc="left", color=BLUE, fontsize=9.5)
    right = axes.twinx()
    for side in ("top", "left", "bottom"):
        right.spines[side].set_visible(False)
    right.spines["right"].set_color("#b0b0b0")
    right.tick_params(colors=MUTED, labelsize=8.5, length=3)
    draw_curve(right, x, size, GREEN, style="--")
    right.set_ylim(0, 1.05)
    right.yaxis.set_major_locator(MaxNLocator(3, steps=ROUND))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(label("ess_fraction").capitalize(), loc="right", color=GREEN, fontsize=9.5)
    return None
