"""How a run is shown: figures, lines, tables, cards and plots."""

import io
import math
import re

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from dask_isgd.display import plots, smoothing
from dask_isgd.display.comparison import plot_runs
from dask_isgd.display.html import card
from dask_isgd.display.live import LiveProgress
from dask_isgd.display.summary_table import comparison_table, legend, print_summary, summary_rows, summary_table
from dask_isgd.display.text import DASH, duration, factor, figures_line, number, percent


class TestNumbers:
    @pytest.mark.parametrize(
        ("function", "value", "text"),
        [
            (number, 1234567, "1,234,567"),
            (number, 12345.6, "12,346"),
            (number, 0.000123456, "0.000123"),
            (number, 0, "0"),
            (number, float("nan"), DASH),
            (number, None, DASH),
            (number, True, DASH),
            (percent, 0.03173, "3.17 %"),
            (percent, None, DASH),
            (factor, 1.834, "1.83×"),
            (duration, 7.31, "7.3 s"),
            (duration, 75, "1 min 15 s"),
            (duration, 7384, "2 h 3 min"),
            (duration, float("inf"), DASH),
        ],
    )
    def test_for_people(self, function, value, text):
        assert function(value) == text


LATEST = {"step": 400, "steps": 4000, "loss": 0.2312, "gain": 1.82, "steps_per_second": 812.4, "mean_age": 45.0}


class TestProgress:
    def test_plain_lines_where_there_is_no_terminal(self):
        stream = io.StringIO()
        with LiveProgress(stream, steps=4000) as progress:
            progress(LATEST)
            progress({**LATEST, "step": 401})  # too soon for another line
            progress({**LATEST, "step": 4000})  # but the last step is always written
        lines = stream.getvalue().splitlines()
        figures = "training loss 0.231  gain 1.82×  steps per second 812  mean age 45"
        assert lines[0] == f"training  step 400 of 4,000  {figures}"
        assert len(lines) == 2
        assert "step 4,000 of 4,000" in lines[1]
        assert "\x1b" not in stream.getvalue()

    def test_nothing_known_yet(self):
        stream = io.StringIO()
        with LiveProgress(stream) as progress:
            progress({})
        assert stream.getvalue() == "starting  step 0\n"

    @pytest.mark.parametrize(("columns", "figures"), [(80, 0), (119, 3), (200, 4)])
    def test_a_bar_on_a_terminal(self, monkeypatch, columns, figures):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = io.StringIO()
        with LiveProgress(stream, steps=4000) as progress:
            progress(LATEST)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        last = text.replace("\r", "\n").strip().splitlines()[-1].rstrip()
        assert len(last) <= columns
        assert "━" in last
        assert "step 400 of 4,000" in last
        assert "left" in last
        known = ("training loss 0.231", "gain 1.82×", "steps per second 812", "mean age 45")
        assert [name for name in known if name in last] == list(known[:figures])

    def test_a_run_that_ends_in_an_error_restores_the_terminal(self, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        stream = io.StringIO()
        with pytest.raises(KeyboardInterrupt), LiveProgress(stream, steps=4):
            raise KeyboardInterrupt
        assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")  # the cursor is back


class TestSummary:
    SUMMARY = {  # noqa: RUF012
        "run": "runs/[red]x",
        "steps": 4000,
        "seconds": 62.0,
        "train_loss": 0.1234,
        "validation_error": None,
        "variance": {"ideal": 4.0, "stale": 9.0, "uniform": 16.0},
        "gain": 1.78,
        "examples_scored": 123456,
        "steps_per_second": 64.5,
    }

    def test_table(self):
        stream = io.StringIO()
        print_summary(self.SUMMARY, stream)
        text = stream.getvalue()
        for part in ("runs/[red]x", "4,000", "1 min 2 s", "2, 3, 4", "1.78×", "123,456"):
            assert part in text
        assert "validation error" not in text  # there was none
        assert "gain: how many times as many examples" in text.replace("\n", " ")
        assert "\x1b" not in text

    def test_of_a_uniform_run(self):
        rows = dict(summary_rows({"run": "r", "variance": {"ideal": None, "stale": -1.0, "uniform": None}}))
        assert rows == {"run": "r"}

    def test_narrow_terminals_lose_nothing(self):
        stream = io.StringIO()
        Console(file=stream, width=30).print(summary_table({"run": "x" * 80}))
        assert stream.getvalue().count("x") == 80

    @pytest.mark.parametrize(
        ("values", "row"),
        [
            ({"validation_error": 0.1, "evaluated": 400}, ("validation error", "10.00 %")),
            ({"validation_error": 0.1, "evaluated": 300}, ("validation error", "10.00 % at step 300")),
            ({"validation_loss": 2.5, "evaluated": 400}, ("validation loss", "2.5")),
        ],
    )
    def test_the_validation(self, values, row):
        assert row in summary_rows({"steps": 400, **values})

    def test_runs_side_by_side(self):
        stream = io.StringIO()
        both = {"one": self.SUMMARY, "two": {**self.SUMMARY, "gain": None, "steps": 7}}
        Console(file=stream, width=100).print(comparison_table(both))
        rows = {line[:30].strip(): line[30:].split() for line in stream.getvalue().splitlines()}
        assert rows["steps"] == ["4,000", "7"]
        assert rows["gain"] == ["1.78×", DASH]

    def test_the_words_of_the_summary_are_explained(self):
        assert [word for word, _ in legend(self.SUMMARY)] == [
            "training loss",
            "gain",
            "spread",
            "steps per second",
        ]
        assert legend({"run": "r"}) == []


class TestFigures:
    def test_the_loss_of_a_regression_takes_the_place_of_its_error(self):
        assert "validation loss 0.5" in figures_line({"validation_loss": 0.5, "validation_error": math.nan})
        assert "validation error 10.00 %" in figures_line({"validation_loss": 0.5, "validation_error": 0.1})

    def test_what_does_not_fit_is_left_out(self):
        assert figures_line(LATEST, 40) == "training loss 0.231  gain 1.82×"
        assert figures_line(LATEST, 5) == ""


class TestHtml:
    def test_is_escaped(self):
        page = card("<script>alert(1)</script>", "running<b>", LATEST)
        assert "<script" not in page
        assert "running&lt;b&gt;" in page
        assert "step 400 of 4,000" in page
        assert "step 400 of 4,000, 4.4 s left" in card("r", "running", LATEST)
        assert "width:10.0%" in page

    @pytest.mark.parametrize(("gate", "text"), [(True, "open"), (0.0, "closed"), (None, None), (float("nan"), None)])
    def test_gate(self, gate, text):
        page = card("r", "running", {**LATEST, "gate": gate})
        assert ("gate" in page) == (text is not None)
        assert text is None or f"<b>{text}</b>" in page

    def test_before_the_first_report(self):
        assert "step 0" in card("r", "starting", {})


def history(n, **changed):
    rng = np.random.default_rng(0)
    step = np.arange(1, n + 1) * 20.0
    columns = {
        "loss": 2 * np.exp(-step / 900) + 0.1 + 0.01 * rng.random(n),
        "variance_ideal": 1 + rng.random(n),
        "variance_stale": 2 + rng.random(n),
        "variance_uniform": 4 + rng.random(n),
        "gain": 2 + 0.1 * rng.random(n),
        "gate": (step > 200).astype(float),
        "mean_age": 30 + rng.random(n),
        "ess_fraction": 0.5 + 0.1 * rng.random(n),
        **changed,
    }
    return xr.Dataset({k: ("report", v) for k, v in columns.items()}, coords={"step": ("report", step)})


EVALUATIONS = xr.Dataset({"error": ("report", [0.9, 0.1, 0.12])}, coords={"step": ("report", [0.0, 640.0, 1280.0])})
NAN = np.full(30, np.nan)


class TestPlot:
    @pytest.mark.parametrize(
        ("reports", "evaluations"),
        [
            (history(400), EVALUATIONS),
            (history(30), None),
            (history(1), EVALUATIONS),
            (history(0), EVALUATIONS.isel(report=slice(0))),
            (None, None),
            (xr.Dataset(), xr.Dataset()),
            (history(30, loss=NAN, gain=NAN, variance_ideal=NAN, variance_stale=NAN, variance_uniform=NAN), None),
            (history(30, variance_ideal=np.full(30, -1.0), loss=np.zeros(30)), EVALUATIONS),
            (history(30, mean_age=NAN, ess_fraction=NAN).drop_vars("gate"), EVALUATIONS),
        ],
        ids=["long", "short", "one", "none", "None", "empty", "uniform", "negative", "no weights"],
    )
    @pytest.mark.parametrize("kind", ["png", "svg"])
    def test_draws_whatever_there_is(self, reports, evaluations, kind):
        file = io.BytesIO()
        plots.plot(reports, evaluations, "a <title> $5 $\\frac$ _$").savefig(file, format=kind)
        assert len(file.getvalue()) > 5_000

    def test_panels_state_what_is_missing(self):
        texts = [text.get_text() for axes in plots.plot(None).axes for text in axes.texts]
        assert texts == ["no report yet", "no evaluation yet", "no norms yet", "no report yet", "no weights"]

    def test_without_classes_the_loss_replaces_the_error(self):
        evaluated = EVALUATIONS.assign(error=("report", [np.nan] * 3), loss=("report", [3.0, 2.0, 1.0]))
        axes = plots.plot(history(400), evaluated).axes[1]
        assert axes.get_title(loc="left") == "Validation loss"
        assert axes.lines[0].get_ydata().tolist() == [3.0, 2.0, 1.0]

    @pytest.mark.parametrize("without", ["", "error", "loss"])
    def test_several_runs_in_each_panel(self, without):
        evaluated = EVALUATIONS.assign(loss=("report", [3.0, 2.0, 1.0])).reset_coords()
        if without == "error":
            evaluated = evaluated.assign(error=("report", [np.nan] * 3))
        reports = history(30).reset_coords().assign(seconds=("report", np.arange(30.0)))
        if without == "loss":
            reports = reports.isel(report=slice(0))
        figure = plot_runs({"one": (reports, evaluated), "two": (reports, evaluated)})
        figure.savefig(io.BytesIO())
        assert [len(axes.lines) for axes in figure.axes] == [2] * 4
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]
        title = figure.axes[2].get_title(loc="left")
        assert title == f"Validation {'loss' if without == 'error' else 'error'}, by steps"

    def test_shows_itself_in_a_notebook(self):
        assert plots.plot(None)._repr_png_().startswith(b"\x89PNG")

    def test_the_plot_shows_the_numbers(self):
        figure = plots.plot(history(400), EVALUATIONS)
        loss, error, variance, gain, *_ = figure.axes
        np.testing.assert_array_equal(loss.lines[0].get_ydata(), history(400)["loss"])
        assert "best 10.00 % at step 640" in error.texts[0].get_text()
        assert {line.get_label() for line in variance.lines if not line.get_label().startswith("_")} == {
            "uniform",
            "as drawn",
            "ideal",
        }
        uniform = next(line for line in variance.lines if line.get_label() == "uniform").get_ydata()
        assert np.all((uniform > 2.0) & (uniform < np.sqrt(5.0)))  # a root, not a trace
        shades = [patch.get_bbox() for patch in gain.patches]
        assert [(box.x0, box.x1) for box in shades] == [(0.0, 220.0)]

    def test_leaves_pyplot_alone(self):
        import subprocess
        import sys

        code = "import sys, dask_isgd.display.plots as p; p.plot(None); assert 'matplotlib.pyplot' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestSmooth:
    def test_against_a_loop(self):
        values = np.random.default_rng(0).random(40)
        values[[3, 17, 18]] = np.nan
        smoothed = smoothing.smooth(values, 9)
        for i in range(40):
            half = min(4, i, 39 - i)
            wanted = np.nan if np.isnan(values[i]) else np.nanmean(values[i - half : i + half + 1])
            np.testing.assert_allclose(smoothed[i], wanted, atol=1e-12)

    def test_keeps_a_line(self):
        np.testing.assert_allclose(smoothing.smooth(np.arange(20.0), 7), np.arange(20.0))

    def test_nothing(self):
        assert smoothing.smooth(np.zeros(0), 5).shape == (0,)
