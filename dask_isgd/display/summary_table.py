"""The summary of a run as a table of names and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dask_isgd.display.text import DASH, _known, duration, factor, number, percent


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``Run.summary()`` as (name, text); rows without a value are left out."""
    variance = summary.get("variance") or {}
    traces = [variance.get(name) for name in ("ideal", "stale", "uniform")]
    roots = [number(math.sqrt(t)) if _known(t) and t >= 0 else DASH for t in traces]
    rows = [
        ("run", str(summary.get("run", DASH))),
        ("status", str(summary.get("status") or DASH)),
        ("steps", number(summary.get("steps"))),
        ("time", duration(summary.get("seconds"))),
        ("training loss", number(summary.get("train_loss"))),
        ("test error", percent(summary.get("validation_error"))),
        ("gain over uniform", factor(summary.get("gain"))),
        ("√Tr Σ ideal / stale / uniform", DASH if set(roots) == {DASH} else " / ".join(roots)),
        ("examples scored", number(summary.get("examples_scored"))),
        ("steps a second", number(summary.get("steps_per_second"))),
    ]
    return [(name, text) for name, text in rows if text != DASH]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """``Run.summary()`` as a table of two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", overflow="fold")
    for name, text in summary_rows(summary):
        table.add_row(name, Text(text))  # not a str: a run's name is no markup
    return table


def print_summary(summary: Mapping[str, Any], stream: TextIO) -> None:
    """The summary on a stream, with colours only where it is a terminal."""
    Console(file=stream, highlight=False).print(summary_table(summary))
