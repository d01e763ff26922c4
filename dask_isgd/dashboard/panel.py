"""A panel of the dashboard: a Bokeh figure that shows a record.

``update`` replaces whole data sources: a few hundred rows, at most once per second, and only if the
record has changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomAction, DataRange1d, FixedTicker, Span

from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.dashboard.style import RED
from dask_isgd.display.ticks import log_ticks


class Panel:
    """A figure, ``root``, and how a record is shown in it."""

    title = ""
    covers: tuple[str, ...] | None = None
    """Columns that the y axis covers; None for all but the faint ones."""
    x_log = y_log = False
    axes = True
    """Whether the panel has axes, which are hidden until there is something to show."""
    meaning = ""
    """What the panel shows, in a sentence; the tip of its question mark."""

    def __init__(self) -> None:
        self.source = ColumnDataSource({})
        self.restarts = ColumnDataSource({"step": []})
        # An invisible mark on what the axes cover: Bokeh warns about axes without data, and one minibatch
        # with almost no loss would flatten the rest of a logarithmic axis.
        self.extent = ColumnDataSource({"x": [1.0, 10.0], "y": [0.1, 1.0]})
        self.root = self.draw()
        self._show_axes(False)
        self.root.add_tools(CustomAction(icon="help", description=f"{self.meaning} Words: docs/glossary.md."))
        if self.y_log:
            self.root.yaxis.ticker = FixedTicker(ticks=[])
        mark = self.root.scatter("x", "y", source=self.extent, size=0, alpha=0)
        for axis in (self.root.x_range, self.root.y_range, *self.root.extra_y_ranges.values()):
            if isinstance(axis, DataRange1d):
                axis.renderers = [mark]

    def draw(self) -> Any:
        """Return the figure, with an empty source."""
        raise NotImplementedError

    def update(self, record: RunRecord) -> None:
        """Show a record."""
        self.source.data = data = self.data(record)
        self.restarts.data = {"step": list(record.restarts)}
        x, y = self.extent_of(data)
        extent = {"x": _bounds(x, self.x_log), "y": _bounds(y, self.y_log)}
        shown = all(extent.values())
        if shown:
            self.extent.data = extent
            if self.y_log:
                low, high = extent["y"]
                self.root.yaxis.ticker.ticks = log_ticks(low, high)
        self._show_axes(shown)

    def _show_axes(self, shown: bool) -> None:
        """Show or hide what means nothing without data: axes, grid, legend, lines at a fixed value."""
        if self.axes:
            for part in (*self.root.axis, *self.root.grid, *self.root.legend, *self.root.select({"type": Span})):
                part.visible = shown

    def data(self, record: RunRecord) -> dict[str, Any]:
        """Return the columns of the source."""
        raise NotImplementedError

    def extent_of(self, data: dict[str, Any]) -> tuple[Any, Any]:
        """Return the values that the axes must cover, (x, y)."""
        shown = self.covers or [name for name in data if name != "step" and not name.startswith("raw_")]
        return np.append(data["step"], [0.0, 10.0]), np.concatenate([data[name] for name in shown])

    def _lines(self, plot: Any, *lines: tuple[str, str, str, Any], raw: bool = False, **options: Any) -> list[Any]:
        """Draw lines over ``step``: (column, label, colour, dash); ``raw``: each with a faint ``raw_`` column."""
        drawn = []
        for column, label, color, dash in lines:
            if raw:
                plot.line("step", f"raw_{column}", source=self.source, color=color, alpha=0.25, line_width=1)
            named = {"legend_label": label} if label else {}
            style_ = {"color": color, "line_width": 2, "line_dash": dash, **named, **options}
            drawn.append(plot.line("step", column, source=self.source, **style_))
        plot.vspan(x="step", source=self.restarts, color=RED, line_dash="dotted", line_width=1, alpha=0.8)
        return drawn


def _bounds(values: Any, log: bool) -> list[float]:
    """Return the least and the greatest value that can be shown; nothing if none can."""
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found) & (found > 0 if log else True)]
    return [float(found.min()), float(found.max())] if len(found) else []
