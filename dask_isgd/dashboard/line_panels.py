"""Panels of what changes with the steps: loss, error, spread, gain, sampling, speed, versions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, LinearAxis, NumeralTickFormatter, Range1d, Span

from dask_isgd.columns import label
from dask_isgd.dashboard import style
from dask_isgd.dashboard.panel import Panel
from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.dashboard.style import BLUE, GREEN, ORANGE, PURPLE, RED
from dask_isgd.display.smoothing import smooth


def _smooth(values: Any) -> Any:
    return smooth(values, max(1, len(values) // 25))


class Loss(Panel):
    title = label("loss").capitalize()
    meaning = "Estimate of the mean loss over all training examples, from the weighted minibatches."
    y_log = True

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "loss", "raw_loss")}
        plot = style.new_plot(self.title, y_log=self.y_log)
        (line,) = self._lines(plot, ("loss", "", BLUE, "solid"), raw=True)
        style.hover(plot, line, ("step", "@step{0,0}"), (label("loss"), "@loss{0.0000}"))
        return plot

    def data(self, record: RunRecord) -> dict[str, Any]:
        loss = np.where(record.progress["loss"] > 0, record.progress["loss"], math.nan)
        return {"step": record.progress["step"], "loss": _smooth(loss), "raw_loss": loss}


class Error(Panel):
    title = label("validation_error").capitalize()
    meaning = "Share of the validation examples that are classified wrongly; without classes, their mean loss."
    covers = ("error",)
    y_log = True

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "error", "loss")}
        plot = style.new_plot(self.title, y_log=self.y_log)
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[000]%")
        (line,) = self._lines(plot, ("error", "", RED, "solid"))
        plot.scatter("step", "error", source=self.source, size=5, color=RED)
        tips = ((label("validation_error"), "@error{0.00%}"), (label("validation_loss"), "@loss{0.0000}"))
        style.hover(plot, line, ("step", "@step{0,0}"), *tips)
        return plot

    def update(self, record: RunRecord) -> None:
        super().update(record)
        error, loss = record.latest.get("validation_error", math.nan), record.latest.get("validation_loss", math.nan)
        if math.isfinite(error) or not math.isfinite(loss):
            self.root.title.text = self.title + (f": {100 * error:.2f} %" if math.isfinite(error) else "")
        else:  # without classes the loss replaces the error
            self.root.title.text = f"{label('validation_loss').capitalize()}: {loss:.4g}"
        self.root.yaxis.formatter.format = "0.[000]%" if not math.isfinite(loss) or math.isfinite(error) else "0.[0000]"

    def data(self, record: RunRecord) -> dict[str, Any]:
        found = {name: record.evaluations[name] for name in ("step", "error", "loss")}
        if not np.isfinite(found["error"]).any():
            found["error"] = found["loss"]
        positive = found["error"][found["error"] > 0]
        if len(positive):  # no logarithm of zero
            found["error"] = np.where(found["error"] == 0, positive.min() / 2, found["error"])
        return found


class Spread(Panel):
    title = "Spread of the gradient"
    meaning = (
        "Standard deviation √Tr Σ of the gradient of one draw: uniform draws, draws as they are, and the best "
        "possible. Lower means less noise."
    )
    y_log = True
    KINDS = ("uniform", "stale", "ideal")

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", *self.KINDS, *(f"raw_{kind}" for kind in self.KINDS))}
        plot = style.new_plot(self.title, y_log=self.y_log)
        lines = self._lines(
            plot,
            ("uniform", label("variance_uniform"), ORANGE, "dashed"),
            ("stale", label("variance_stale"), BLUE, "solid"),
            ("ideal", label("variance_ideal"), GREEN, "dotted"),
            raw=True,
        )
        tips = [(label(f"variance_{kind}"), f"@{kind}{{0.000}}") for kind in self.KINDS]
        style.hover(plot, lines[1], ("step", "@step{0,0}"), *tips)
        style.legend(plot)
        return plot

    def data(self, record: RunRecord) -> dict[str, Any]:
        found = {"step": record.progress["step"]}
        for kind in self.KINDS:
            trace = record.progress[f"variance_{kind}"]
            # Estimates of a trace are unbiased, so some are negative: average first, then take the root.
            for name, values in ((kind, _smooth(trace)), (f"raw_{kind}", trace)):
                found[name] = np.sqrt(np.where(values > 0, values, math.nan))
        return found


class Gain(Panel):
    title = "Gain"
    meaning = (
        "How many times as many examples uniform draws need for a gradient with as little noise. "
        "While it is too low the gate is closed and draws are uniform."
    )

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "gain", "raw_gain", "candidate")}
        self.closed = ColumnDataSource({"left": [], "right": []})
        plot = style.new_plot(self.title)
        plot.vstrip(
            x0="left",
            x1="right",
            source=self.closed,
            fill_color=style.LINE,
            fill_alpha=0.18,
            line_color=None,
            legend_label="gate closed",
        )
        lines = self._lines(plot, ("gain", label("gain"), PURPLE, "solid"), raw=True)
        lines += self._lines(plot, ("candidate", "by weight", GREEN, "dotted"))
        plot.add_layout(Span(location=1.0, dimension="width", line_color=style.MUTED, line_dash="dashed"))
        plot.yaxis.ticker = BasicTicker(min_interval=0.01, desired_num_ticks=5)  # no label twice
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[00]")
        tips = (("step", "@step{0,0}"), (label("gain"), "@gain{0.00}×"), (label("candidate_gain"), "@candidate{0.00}×"))
        style.hover(plot, lines[0], *tips)
        style.legend(plot)
        return plot

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
    """Return the first and last step of each span with a closed gate; a report holds for the steps up to the next."""
    if not len(step):
        return [], []
    closed = np.concatenate([[False], np.asarray(gate) == 0, [False]]).astype(int)
    first, last = np.flatnonzero(np.diff(closed) == 1), np.flatnonzero(np.diff(closed) == -1)
    left = [0.0 if i == 0 else float(step[i]) for i in first]
    return left, [float(step[min(i, len(step) - 1)]) for i in last]


class Sampling(Panel):
    title = "Sample size and coefficient"
    meaning = (
        "Effective sample size: the share of the examples that is really in use, 100 % for uniform draws. Largest "
        "coefficient: by how much the loss of the least probable example is multiplied."
    )
    covers = ("largest",)  # the other axis is fixed

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "size", "largest")}
        plot = style.new_plot(self.title)
        plot.y_range = Range1d(0, 1.05)
        plot.yaxis.formatter = NumeralTickFormatter(format="0%")
        plot.extra_y_ranges = {"largest": DataRange1d(start=0)}
        right = LinearAxis(y_range_name="largest")
        style.style_axis(right, PURPLE)
        style.style_axis(plot.yaxis[0], GREEN)
        right.ticker.desired_num_ticks = 5
        plot.add_layout(right, "right")
        (size,) = self._lines(plot, ("size", "effective size", GREEN, "solid"))
        self._lines(plot, ("largest", label("largest_coefficient"), PURPLE, "dashed"), y_range_name="largest")
        tips = ((label("ess_fraction"), "@size{0.0%}"), (label("largest_coefficient"), "@largest{0.0}"))
        style.hover(plot, size, ("step", "@step{0,0}"), *tips)
        style.legend(plot)
        return plot

    def data(self, record: RunRecord) -> dict[str, Any]:
        rows = record.progress
        size, largest = rows["ess_fraction"], rows["largest_coefficient"]
        return {"step": rows["step"], "size": size, "largest": largest}


class Speed(Panel):
    title = "Examples per second"
    meaning = "Examples that the learner trains on per second, and that all scorers together score."

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "learned", "scored")}
        plot = style.new_plot(self.title)
        plot.y_range.start = 0
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[00]a")
        scored, learned = label("scored_per_second"), label("learned_per_second")
        lines = self._lines(plot, ("scored", "scored", ORANGE, "solid"), ("learned", "learned", BLUE, "solid"))
        tips = (("step", "@step{0,0}"), (scored, "@scored{0,0}"), (learned, "@learned{0,0}"))
        style.hover(plot, lines[1], *tips)
        style.legend(plot)
        return plot

    def data(self, record: RunRecord) -> dict[str, Any]:
        rows = record.progress
        scored, learned = rows["scored_per_second"], rows["learned_per_second"]
        return {"step": rows["step"], "learned": learned, "scored": scored}


class Versions(Panel):
    title = "Steps behind the learner"
    meaning = (
        "How old, in steps, are the weights on average, the version that scorers use, and the version last published."
    )

    def draw(self) -> Any:
        self.source.data = {name: [] for name in ("step", "published", "scored", "mean")}
        plot = style.new_plot(self.title)
        plot.y_range.start = 0
        style.whole_numbers(plot.yaxis)
        lines = self._lines(
            plot,
            ("mean", label("mean_age"), GREEN, "dotted"),
            ("scored", "in use", ORANGE, "solid"),
            ("published", label("published_behind"), BLUE, "solid"),
        )
        tips = (
            ("step", "@step{0,0}"),
            (label("published_behind"), "@published{0,0}"),
            (label("scored_behind"), "@scored{0,0}"),
            (label("mean_age"), "@mean{0,0}"),
        )
        style.hover(plot, lines[2], *tips)
        style.legend(plot)
        return plot

    def data(self, record: RunRecord) -> dict[str, Any]:
        rows = record.progress
        behind, scored, mean = rows["published_behind"], rows["scored_behind"], rows["mean_age"]
        return {"step": rows["step"], "published": behind, "scored": scored, "mean": mean}
