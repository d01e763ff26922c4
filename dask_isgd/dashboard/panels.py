"""The pictures of a run, each a Bokeh figure that is filled from a record.

``update`` sets whole data sources: a few hundred rows, once a second at most, only when the record
has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    DataRange1d,
    LinearAxis,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
    Span,
)

from dask_isgd.curves import smooth
from dask_isgd.dashboard import style
from dask_isgd.dashboard.record import RunRecord
from dask_isgd.dashboard.style import BLUE, GREEN, ORANGE, PURPLE, RED

_MAP_COLUMNS = 32


class Panel:
    """A figure, ``root``, and how a record is drawn in it."""

    title = ""

    def __init__(self) -> None:
        self.source = ColumnDataSource({})
        self.extent = ColumnDataSource({"x": [1.0, 10.0], "y": [0.1, 1.0]})
        self.restarts = ColumnDataSource({"step": []})
        self.root = self.draw()

    def draw(self) -> Any:
        """The figure, with an empty source."""
        raise NotImplementedError

    def update(self, record: RunRecord) -> None:
        """Show a record."""
        self.source.data = self.data(record)
        self.restarts.data = {"step": list(record.restarts)}

    def data(self, record: RunRecord) -> dict[str, Any]:
        """What the source is to hold."""
        raise NotImplementedError

    def _log_axis(self, made: Any, axis: str) -> None:
        """Let a logarithmic axis cover ``extent``, which is never empty: Bokeh complains of axes without data."""
        mark = made.scatter("x", "y", source=self.extent, size=0, alpha=0)
        (made.y_range if axis == "y" else made.x_range).renderers = [mark]

    def _extend(self, axis: str, *values: Any) -> None:
        """Make ``extent`` cover the finite positive values."""
        shown = np.concatenate([np.asarray(part, np.float64) for part in values])
        shown = shown[np.isfinite(shown) & (shown > 0)]
        if len(shown):
            self.extent.data = {**self.extent.data, axis: [shown.min(), max(shown.max(), 1.01 * shown.min())]}

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


def _smooth(values: Any) -> Any:
    return smooth(values, max(1, len(values) // 25))


class Loss(Panel):
    title = "Training loss"

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "loss", "raw_loss")}
        made = style.plot(self.title, y_log=True)
        (line,) = self._lines(made, ("loss", "", BLUE, "solid"), raw=True)
        self._log_axis(made, "y")
        style.hover(made, line, ("step", "@step{0,0}"), ("loss", "@loss{0.0000}"))
        return made

    def data(self, record: RunRecord) -> dict[str, Any]:
        loss = np.where(record.progress["loss"] > 0, record.progress["loss"], math.nan)
        shown = _smooth(loss)
        self._extend("y", shown)  # one lucky minibatch would flatten the rest of a logarithmic axis
        self._extend("x", record.progress["step"])
        return {"step": record.progress["step"], "loss": shown, "raw_loss": loss}


class Error(Panel):
    title = "Validation error"

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "error", "loss")}
        made = style.plot(self.title)
        made.y_range.start = 0
        made.yaxis.formatter = NumeralTickFormatter(format="0.[0]%")
        (line,) = self._lines(made, ("error", "", RED, "solid"))
        made.scatter("step", "error", source=self.source, size=5, color=RED)
        style.hover(made, line, ("step", "@step{0,0}"), ("error", "@error{0.00%}"), ("loss", "@loss{0.0000}"))
        return made

    def update(self, record: RunRecord) -> None:
        super().update(record)
        error = record.latest.get("test_error", math.nan)
        self.root.title.text = self.title + (f": {100 * error:.2f} %" if math.isfinite(error) else "")

    def data(self, record: RunRecord) -> dict[str, Any]:
        return {name: record.evaluations[name] for name in ("step", "error", "loss")}


class Spread(Panel):
    title = "Spread of the gradient, √Tr Σ of one draw"
    KINDS = ("uniform", "stale", "ideal")

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", *self.KINDS, *(f"raw_{kind}" for kind in self.KINDS))}
        made = style.plot(self.title, y_log=True)
        lines = self._lines(
            made,
            ("uniform", "uniform", ORANGE, "dashed"),
            ("stale", "as drawn", BLUE, "solid"),
            ("ideal", "ideal", GREEN, "dotted"),
            raw=True,
        )
        self._log_axis(made, "y")
        tips = [
            (name, f"@{column}{{0.000}}")
            for name, column in zip(("uniform", "as drawn", "ideal"), self.KINDS, strict=True)
        ]
        style.hover(made, lines[1], ("step", "@step{0,0}"), *tips)
        style.legend(made)
        return made

    def data(self, record: RunRecord) -> dict[str, Any]:
        found = {"step": record.progress["step"]}
        for kind in self.KINDS:
            trace = record.progress[f"variance_{kind}"]
            # Estimates of a trace are unbiased, so some are negative: average first, root after.
            for name, values in ((kind, _smooth(trace)), (f"raw_{kind}", trace)):
                found[name] = np.sqrt(np.where(values > 0, values, math.nan))
        self._extend("y", *(found[kind] for kind in self.KINDS))
        self._extend("x", found["step"])
        return found


class Gain(Panel):
    title = "Gain over uniform draws"

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "gain", "raw_gain", "candidate")}
        self.closed = ColumnDataSource({"left": [], "right": []})
        made = style.plot(self.title)
        made.vstrip(
            x0="left",
            x1="right",
            source=self.closed,
            fill_color=style.SHADE,
            line_color=None,
            legend_label="gate closed",
        )
        lines = self._lines(made, ("gain", "as drawn", PURPLE, "solid"), raw=True)
        lines += self._lines(made, ("candidate", "if drawn by weight", GREEN, "dotted"))
        made.add_layout(Span(location=1.0, dimension="width", line_color=style.MUTED, line_dash="dashed"))
        made.y_range.renderers = lines
        made.yaxis.formatter = NumeralTickFormatter(format="0.[00]")
        tips = (("step", "@step{0,0}"), ("gain", "@gain{0.00}×"), ("if drawn by weight", "@candidate{0.00}×"))
        style.hover(made, lines[0], *tips)
        style.legend(made)
        return made

    def update(self, record: RunRecord) -> None:
        super().update(record)
        left, right = closed_spans(record.progress["step"], record.progress["gate"])
        self.closed.data = {"left": left, "right": right}
        gain, gate = record.latest.get("gain", math.nan), record.latest.get("gate", math.nan)
        state = {1.0: ", gate open", 0.0: ", gate closed"}.get(gate, "")
        self.root.title.text = self.title + (f": {gain:.2f}×{state}" if math.isfinite(gain) else "")

    def data(self, record: RunRecord) -> dict[str, Any]:
        gain = record.progress["gain"]
        candidate = _smooth(record.progress["candidate_gain"])
        return {"step": record.progress["step"], "gain": _smooth(gain), "raw_gain": gain, "candidate": candidate}


def closed_spans(step: Any, gate: Any) -> tuple[list[float], list[float]]:
    """First and last step of each stretch with a closed gate; a report speaks for the steps up to the next."""
    if not len(step):
        return [], []
    closed = np.concatenate([[False], np.asarray(gate) == 0, [False]]).astype(int)
    first, last = np.flatnonzero(np.diff(closed) == 1), np.flatnonzero(np.diff(closed) == -1)
    left = [0.0 if i == 0 else float(step[i]) for i in first]
    return left, [float(step[min(i, len(step) - 1)]) for i in last]


class Sampling(Panel):
    title = "Effective sample size and largest coefficient"

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "size", "largest")}
        made = style.plot(self.title)
        made.y_range = Range1d(0, 1.05)
        made.yaxis.formatter = NumeralTickFormatter(format="0%")
        made.extra_y_ranges = {"largest": DataRange1d(start=0)}
        right = LinearAxis(y_range_name="largest")
        style.dress(right, PURPLE)
        style.dress(made.yaxis[0], GREEN)
        right.ticker.desired_num_ticks = 5
        made.add_layout(right, "right")
        (size,) = self._lines(made, ("size", "effective sample size", GREEN, "solid"))
        (largest,) = self._lines(made, ("largest", "largest coefficient", PURPLE, "dashed"), y_range_name="largest")
        made.extra_y_ranges["largest"].renderers = [largest]
        tips = (("step", "@step{0,0}"), ("size", "@size{0.0%}"), ("largest coefficient", "@largest{0.0}"))
        style.hover(made, size, *tips)
        style.legend(made)
        return made

    def data(self, record: RunRecord) -> dict[str, Any]:
        rows = record.progress
        size, largest = rows["effective_sample_size"], rows["largest_coefficient"]
        return {"step": rows["step"], "size": size, "largest": largest}


class Speed(Panel):
    title = "Examples a second"

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "learned", "scored")}
        made = style.plot(self.title)
        made.y_range.start = 0
        made.yaxis.formatter = NumeralTickFormatter(format="0.[0]a")
        lines = self._lines(made, ("scored", "scored", ORANGE, "solid"), ("learned", "learned", BLUE, "solid"))
        tips = (("step", "@step{0,0}"), ("scored/s", "@scored{0,0}"), ("learned/s", "@learned{0,0}"))
        style.hover(made, lines[1], *tips)
        style.legend(made)
        return made

    def data(self, record: RunRecord) -> dict[str, Any]:
        rows = record.progress
        scored, learned = rows["scored_per_second"], rows["learned_per_second"]
        return {"step": rows["step"], "learned": learned, "scored": scored}


class Versions(Panel):
    title = "Versions: steps behind the learner"

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "published", "scored", "mean")}
        made = style.plot(self.title)
        made.y_range.start = 0
        made.yaxis.formatter = NumeralTickFormatter(format="0,0")
        lines = self._lines(
            made,
            ("mean", "mean age of weights", GREEN, "dotted"),
            ("scored", "newest in use by scorers", ORANGE, "solid"),
            ("published", "newest published", BLUE, "solid"),
        )
        tips = (
            ("step", "@step{0,0}"),
            ("published", "@published{0,0}"),
            ("in use", "@scored{0,0}"),
            ("mean age", "@mean{0,0}"),
        )
        style.hover(made, lines[2], *tips)
        style.legend(made)
        return made

    def data(self, record: RunRecord) -> dict[str, Any]:
        rows = record.progress
        behind, scored, mean = rows["published_behind"], rows["scored_behind"], rows["mean_age"]
        return {"step": rows["step"], "published": behind, "scored": scored, "mean": mean}


class AgeMap(Panel):
    title = "Age of the weights of every chunk, in steps"

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("x", "y", "age", "text", "chunks")}
        self.mapper = LinearColorMapper(palette=list(style.AGES), low=0, high=1, low_color=style.NEVER)
        made = style.plot(self.title, x="", x_range=(-0.5, _MAP_COLUMNS - 0.5), y_range=Range1d(0.5, -0.5))
        made.axis.visible = False
        made.grid.visible = False
        cells = made.rect(
            "x",
            "y",
            0.94,
            0.9,
            source=self.source,
            fill_color={"field": "age", "transform": self.mapper},
            line_color=None,
        )
        bar = ColorBar(color_mapper=self.mapper, width=10, label_standoff=6, border_line_color=None)
        bar.background_fill_color = None
        bar.formatter = NumeralTickFormatter(format="0,0")
        bar.ticker = BasicTicker(desired_num_ticks=4)
        bar.major_label_text_font_size = "11px"
        bar.major_label_text_color = style.MUTED
        made.add_layout(bar, "right")
        style.hover(made, cells, ("chunks", "@chunks"), ("age", "@text"), mode="mouse")
        return made

    def update(self, record: RunRecord) -> None:
        super().update(record)
        portrait = record.portrait
        cells = portrait.cells if portrait else []
        columns = max(1, min(_MAP_COLUMNS, len(cells)))
        self.root.x_range.update(start=-0.5, end=columns - 0.5)
        self.root.y_range.update(start=-(-len(cells) // columns) - 0.5, end=-0.5)
        self.mapper.high = max([1, *cells])
        per_cell = _per_cell(record)
        self.root.title.text = self.title + (f" (the oldest of each {per_cell:,})" if per_cell > 1 else "")

    def data(self, record: RunRecord) -> dict[str, Any]:
        portrait = record.portrait
        cells = portrait.cells if portrait else []
        per_cell, chunks = _per_cell(record), portrait.chunks if portrait else 0
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


def _per_cell(record: RunRecord) -> int:
    portrait = record.portrait
    return max(1, -(-portrait.chunks // max(1, len(portrait.cells)))) if portrait else 1


class Bars(Panel):
    """A histogram; ``edges`` and ``counts`` say of what."""

    x = ""
    x_log = False
    color = BLUE

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("left", "right", "count")}
        made = style.plot(self.title, x=self.x, x_log=self.x_log)
        made.y_range.start = 0
        made.yaxis.formatter = NumeralTickFormatter(format="0,0")
        bars = made.quad(
            left="left",
            right="right",
            top="count",
            bottom=0,
            source=self.source,
            fill_color=self.color,
            line_color="#ffffff",
            line_width=0.5,
        )
        tips = (("from", "@left{0,0.[000]}"), ("to", "@right{0,0.[000]}"), ("count", "@count{0,0}"))
        style.hover(made, bars, *tips, mode="mouse")
        if self.x_log:
            made.y_range.renderers = [bars]
            self._log_axis(made, "x")
        return made

    def data(self, record: RunRecord) -> dict[str, Any]:
        edges, counts = self.bins(record)
        self._extend("x", edges)
        return {"left": edges[:-1], "right": edges[1:], "count": counts}

    def bins(self, record: RunRecord) -> tuple[Any, Any]:
        raise NotImplementedError


class AgeHistogram(Bars):
    title = "Chunks by age"
    x = "steps since they were scored"

    def bins(self, record: RunRecord) -> tuple[Any, Any]:
        portrait = record.portrait
        if portrait is None:
            return np.empty(0), np.empty(0)
        return np.linspace(0, portrait.age_high, len(portrait.age_counts) + 1), np.array(portrait.age_counts)

    def update(self, record: RunRecord) -> None:
        super().update(record)
        never = record.portrait.never if record.portrait else 0
        self.root.title.text = self.title + (f": {never:,} never scored" if never else "")


class Weights(Bars):
    title = "Weights"
    x = "weight (gradient norm)"
    x_log = True
    color = GREEN

    def bins(self, record: RunRecord) -> tuple[Any, Any]:
        portrait = record.portrait
        if portrait is None or not sum(portrait.weight_counts):
            return np.empty(0), np.empty(0)
        counts = np.array(portrait.weight_counts)
        return np.logspace(portrait.weight_low, portrait.weight_high, len(counts) + 1), counts

    def update(self, record: RunRecord) -> None:
        super().update(record)
        portrait, text = record.portrait, self.title
        if portrait is not None and portrait.top_share is not None:
            text += f": the heaviest 1 % hold {100 * portrait.top_share:.0f} % of the sum"
        if portrait is not None and portrait.zeros:
            text += f"; {portrait.zeros:,} are zero"
        self.root.title.text = text


PANELS: dict[str, Callable[[], Panel]] = {
    "loss": Loss,
    "error": Error,
    "spread": Spread,
    "gain": Gain,
    "sampling": Sampling,
    "speed": Speed,
    "versions": Versions,
    "ages": AgeMap,
    "age-histogram": AgeHistogram,
    "weights": Weights,
}
"""Every panel by the name of its page."""
