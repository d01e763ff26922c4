"""Panels of the current state of all chunks: their ages and the distribution of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import BasicTicker, ColorBar, LinearColorMapper, NumeralTickFormatter, Range1d

from dask_isgd.dashboard import style
from dask_isgd.dashboard.panel import Panel
from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.dashboard.style import BLUE, GREEN

_MAP_COLUMNS = 32


class AgeMap(Panel):
    title = "Age of the weights of every chunk"
    meaning = "Steps since the weights of each chunk of the data were computed; grey: never."
    axes = False

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("x", "y", "age", "text", "chunks")}
        self.mapper = LinearColorMapper(palette=list(style.AGES), low=0, high=1, low_color=style.NEVER)
        plot = style.new_plot(self.title, x="", x_range=(-0.5, _MAP_COLUMNS - 0.5), y_range=Range1d(0.5, -0.5))
        plot.axis.visible = False
        plot.grid.visible = False
        cells = plot.rect(
            "x",
            "y",
            0.94,
            0.9,
            source=self.source,
            fill_color={"field": "age", "transform": self.mapper},
            line_color=None,
        )
        bar = ColorBar(color_mapper=self.mapper, width=10, label_standoff=6, border_line_color=None, visible=False)
        bar.background_fill_color = None
        bar.formatter = NumeralTickFormatter(format="0,0")
        bar.ticker = BasicTicker(min_interval=1, desired_num_ticks=4)
        bar.major_label_text_font_size = "11px"
        bar.major_label_text_color = style.MUTED
        plot.add_layout(bar, "right")
        self.bar = bar
        style.hover(plot, cells, ("chunks", "@chunks"), ("age", "@text"), mode="mouse")
        return plot

    def update(self, record: RunRecord) -> None:
        super().update(record)
        summary = record.weight_summary
        cells = summary.cells if summary else []
        columns = max(1, min(_MAP_COLUMNS, len(cells)))
        self.root.x_range.update(start=-0.5, end=columns - 0.5)
        self.root.y_range.update(start=-(-len(cells) // columns) - 0.5, end=-0.5)
        self.mapper.high = max([1, *cells])
        self.bar.visible = bool(cells)
        per_cell = _per_cell(record)
        self.root.title.text = self.title + (f" (the oldest of each {per_cell:,})" if per_cell > 1 else "")

    def data(self, record: RunRecord) -> dict[str, Any]:
        summary = record.weight_summary
        cells = summary.cells if summary else []
        per_cell, chunks = _per_cell(record), summary.chunks if summary else 0
        columns = max(1, min(_MAP_COLUMNS, len(cells)))
        at = np.arange(len(cells))
        bounds = [(i * per_cell, min((i + 1) * per_cell, chunks) - 1) for i in range(len(cells))]
        return {
            "x": at % columns,
            "y": at // columns,
            "age": np.array(cells, np.float64),
            "text": ["never scored" if age < 0 else f"{age:,} steps" for age in cells],
            "chunks": [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in bounds],
        }

    def extent_of(self, data: dict[str, Any]) -> tuple[Any, Any]:
        return data["x"], data["y"]


def _per_cell(record: RunRecord) -> int:
    summary = record.weight_summary
    return max(1, -(-summary.chunks // max(1, len(summary.cells)))) if summary else 1


class Bars(Panel):
    """A histogram of what ``bins`` returns."""

    x = ""
    color = BLUE

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("left", "right", "count")}
        plot = style.new_plot(self.title, x=self.x, x_log=self.x_log)
        plot.y_range.start = 0
        style.whole_numbers(plot.yaxis)
        bars = plot.quad(
            left="left",
            right="right",
            top="count",
            bottom=0,
            source=self.source,
            fill_color=self.color,
            line_color=style.LINE,
            line_width=0.5,
        )
        tips = (("from", "@left{0,0.[000]}"), ("to", "@right{0,0.[000]}"), ("count", "@count{0,0}"))
        style.hover(plot, bars, *tips, mode="mouse")
        return plot

    def data(self, record: RunRecord) -> dict[str, Any]:
        edges, counts = self.bins(record)
        return {"left": edges[:-1], "right": edges[1:], "count": counts}

    def extent_of(self, data: dict[str, Any]) -> tuple[Any, Any]:
        return np.append(data["left"], data["right"]), data["count"]

    def bins(self, record: RunRecord) -> tuple[Any, Any]:
        """Return the edges, (n + 1,), and the counts, (n,)."""
        raise NotImplementedError


class AgeHistogram(Bars):
    title = "Chunks by age"
    meaning = "How many chunks have weights of each age, in steps."
    x = "steps since they were scored"

    def bins(self, record: RunRecord) -> tuple[Any, Any]:
        summary = record.weight_summary
        if summary is None:
            return np.empty(0), np.empty(0)
        return np.linspace(0, summary.age_high, len(summary.age_counts) + 1), np.array(summary.age_counts)

    def update(self, record: RunRecord) -> None:
        super().update(record)
        never = record.weight_summary.never if record.weight_summary else 0
        self.root.title.text = self.title + (f": {never:,} never scored" if never else "")


class Weights(Bars):
    title = "Weights"
    meaning = "How many examples have a weight (gradient norm) of each size: the wider, the more there is to gain."
    x = "weight (gradient norm)"
    x_log = True
    color = GREEN

    def bins(self, record: RunRecord) -> tuple[Any, Any]:
        summary = record.weight_summary
        if summary is None or not sum(summary.weight_counts):
            return np.empty(0), np.empty(0)
        counts = np.array(summary.weight_counts)
        return np.logspace(summary.weight_low, summary.weight_high, len(counts) + 1), counts

    def update(self, record: RunRecord) -> None:
        super().update(record)
        summary, text = record.weight_summary, self.title
        if summary is not None and summary.top_share is not None:
            text += f": top 1 % hold {100 * summary.top_share:.0f} %"
        if summary is not None and summary.zeros:
            text += f"; {summary.zeros:,} are zero"
        self.root.title.text = text
