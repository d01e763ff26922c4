"""How a run is shown: figures, lines, tables and cards."""

import io
import math
import re

import pytest
from rich.console import Console

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
            progress({**LATEST, "step": 4000})  # too soon for another line
            progress({**LATEST, "step": 4000, "status": "finished"})  # but the end is always written
        lines = stream.getvalue().splitlines()
        figures = "training loss 0.231  gain 1.82×  steps per second 812  mean age 45"
        assert lines[0] == f"training  step 400 of 4,000  {figures}"
        assert len(lines) == 2
        assert lines[1].startswith("finished  step 4,000 of 4,000")
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

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ({"validation_error": 0.1, "evaluated": 300, "step": 450}, "validation error 10.00 % at step 300"),
            ({"validation_error": 0.1, "evaluated": 450, "step": 450}, "validation error 10.00 %"),
            ({"validation_loss": 2.5, "evaluated": 300, "step": 450}, "validation loss 2.5 at step 300"),
            ({"validation_error": None, "evaluated": 300, "step": 450}, ""),
        ],
    )
    def test_an_evaluation_older_than_the_step_shown_says_its_step(self, values, text):
        assert figures_line(values) == text

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
