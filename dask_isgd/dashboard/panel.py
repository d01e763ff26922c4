"""A picture of a run: a Bokeh figure that is filled from a record.

``update`` sets whole data sources: a few hundred rows, once a second at most, only when the record
has changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d

from dask_isgd.dashboard.record import RunRecord
from dask_isgd.dashboard.style import RED


class Panel:
    """A figure, ``root``, and how a record is drawn in it."""

    title = ""
    covers: tuple[str, ...] | None = None
    """Columns that the y axis covers; None: all but faint ones."""
    x_log = y_log = False

    def __init__(self) -> None:
        self.source = ColumnDataSource({})
        self.restarts = ColumnDataSource({"step": []})
        # An invisible mark on what the axes are to cover: Bokeh complains of axes without data, and one
        # lucky minibatch would flatten the rest of a logarithmic axis.
        self.extent = ColumnDataSource({"x": [1.0, 10.0], "y": [0.1, 1.0]})
        self.root = self.draw()
        mark = self.root.scatter("x", "y", source=self.extent, size=0, alpha=0)
        for axis in (self.root.x_range, self.root.y_range, *self.root.extra_y_ranges.values()):
            if isinstance(axis, DataRange1d):
                axis.renderers = [mark]

    def draw(self) -> Any:
        """The figure, with an empty source."""
        raise NotImplementedError

    def update(self, record: RunRecord) -> None:
        """Show a record."""
        self.source.data = data = self.data(record)
        self.restarts.data = {"step": list(record.restarts)}
        x, y = self.extend(data)
        extent = {"x": _bounds(x, self.x_log), "y": _bounds(y, self.y_log)}
        if all(extent.values()):
            self.extent.data = extent

    def data(self, record: RunRecord) -> dict[str, Any]:
        """What the source is to hold."""
        raise NotImplementedError

    def extend(self, data: dict[str, Any]) -> tuple[Any, Any]:
        """Values that the axes are to cover, (x, y)."""
        shown = self.covers or [name for name in data if name != "step" and not name.startswith("raw_")]
        return np.append(data["step"], [0.0, 10.0]), np.concatenate([data[name] for name in shown])

    def _lines(self, made: Any, *lines: tuple[str, str, str, Any], raw: bool = False, **how: Any) -> list[Any]:
        """Lines over ``step``: (column, label, colour, dash); ``raw``: a faint ``raw_`` column behind each."""
        drawn = []
        for column, label, color, dash in lines:
            if raw:
                made.line("step", f"raw_{column}", source=self.source, color=color, alpha=0.25, line_width=1)
            named = {"legend_label": label} if label else {}
            style_ = {"color": color, "line_width": 2, "line_dash": dash, **named, **how}
            drawn.append(made.line("step", column, source=self.source, **style_))
        made.vspan(x="step", source=self.restarts, color=RED, line_dash="dotted", line_width=1, alpha=0.8)
        return drawn


def _bounds(values: Any, log: bool) -> list[float]:
    """Least and greatest of what can be shown; empty where nothing can."""
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found) & (found > 0 if log else True)]
    return [float(found.min()), float(found.max())] if len(found) else []
