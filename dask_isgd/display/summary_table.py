"""The summary of a run as a table of names and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dask_isgd.columns import LEGEND, label
from dask_isgd.display.text import DASH, at_step, duration, factor, known, noise_scale, number, percent


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return ``Run.summary()`` as (label, text), without the rows that have no value."""
    variance = summary.get("variance") or {}
    kinds = ("ideal", "stale", "uniform")
    traces = [variance.get(kind) for kind in kinds]
    roots = [number(math.sqrt(t)) if known(t) and t >= 0 else DASH for t in traces]
    names = ", ".join(label(f"variance_{kind}") for kind in kinds)
    older = at_step(summary.get("evaluated"), summary.get("steps"))
    validation = [
        (label(name), text(summary.get(name)))
        for name, text in (("validation_error", percent), ("validation_loss", number))
    ]
    rows = [
        ("run", str(summary.get("run", DASH))),
        ("status", str(summary.get("status") or DASH)),
        ("steps", number(summary.get("steps"))),
        ("time", duration(summary.get("seconds"))),
        (label("loss"), number(summary.get("train_loss"))),
        *((name, text if text == DASH else text + older) for name, text in validation),
        (label("gain"), factor(summary.get("gain"))),
        (label("noise_scale"), noise_scale(summary.get("noise_scale"), summary.get("batch_size"))),
        (f"spread: {names}", DASH if set(roots) == {DASH} else ", ".join(roots)),
        (label("examples_scored"), number(summary.get("examples_scored"))),
        (label("steps_per_second"), number(summary.get("steps_per_second"))),
    ]
    return [(name, text) for name, text in rows if text != DASH]


def legend(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the words in the rows of a summary that need an explanation, with their meanings."""
    shown = " ".join(name for name, _ in summary_rows(summary))
    return [(word, meaning) for word, meaning in LEGEND.items() if word in shown]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return ``Run.summary()`` as a table of two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", overflow="fold")
    for name, text in summary_rows(summary):
        table.add_row(name, Text(text))  # not a str: a run's name must not be read as markup
    return table


def comparison_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the summaries of several runs, by name, as a table with one column per run."""
    columns = {name: dict(summary_rows({**summary, "run": None})) for name, summary in summaries.items()}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", style="dim", no_wrap=True)
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in dict.fromkeys(row for rows in columns.values() for row in rows if row != "run"):
        table.add_row(row, *(Text(rows.get(row, DASH)) for rows in columns.values()))
    return table


def print_summary(summary: Mapping[str, Any], stream: TextIO) -> None:
    """Print the summary and a legend of its words to a stream, in colour only if it is a terminal."""
    console = Console(file=stream, highlight=False)
    console.print(summary_table(summary))
    for word, meaning in legend(summary):
        console.print(Text(f"{word}: {meaning}"), style="dim", soft_wrap=not console.is_terminal)
