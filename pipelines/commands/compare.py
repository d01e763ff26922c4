"""``dask isgd list`` and ``compare``: several runs side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dask_isgd.columns import label
from dask_isgd.display.summary_table import comparison_table
from dask_isgd.display.text import DASH, duration, factor, number, percent
from dask_isgd.errors import IsgdError, RunNotFoundError
from dask_isgd.pipelines.commands.show import RunProgress, read_progress, save_figure
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.backends.stores import join, open_folder


def list_runs(folder: str) -> None:
    """Print a table of the runs in a folder, the latest reports first. Raises RunNotFoundError if it holds none."""
    found: list[tuple[str, RunProgress | None]] = []
    for name in open_folder(folder).names():
        place = join(folder, name)
        if RunDirectory(place).exists():
            try:
                found.append((name, read_progress(place)))
            except IsgdError:  # not yet a report, or damaged: `status` and `verify` show which
                found.append((name, None))
    if not found:
        raise RunNotFoundError(f"no run in the folder {folder}; pass the folder that holds the run directories")
    found.sort(key=lambda pair: pair[1].silent_seconds if pair[1] is not None else float("inf"))
    Console(highlight=False).print(_table(found))


def _table(found: Sequence[tuple[str, RunProgress | None]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run", "status", "step", label("validation_error"), label("gain"), "last report"):
        table.add_column(name, no_wrap=name != "run")
    for name, now in found:
        if now is None:
            table.add_row(Text(name), "no report yet")
            continue
        error, loss = now.summary.get("validation_error"), now.summary.get("validation_loss")
        validation = percent(error) if error is not None or loss is None else f"{number(loss)} (loss)"
        ago = duration(now.silent_seconds)
        steps = f"{now.step:,} of {now.of:,}"
        row = (now.status, steps, validation, factor(now.summary.get("gain")))
        table.add_row(Text(name), *row, ago if ago == DASH else f"{ago} ago")
    return table


def compare(runs: Sequence[str], path: str | None = None) -> str:
    """Print the summaries of runs side by side and save a plot with all of them in each panel; return its path."""
    from dask_isgd.display.comparison import plot_runs

    summaries, curves = {}, {}
    for run in runs:
        directory = RunDirectory(run)
        name = directory.name if directory.name not in curves else run
        summaries[name] = read_progress(run).summary
        curves[name] = directory.read_columns(), directory.read_columns("evaluation")
    Console(file=sys.stdout, highlight=False).print(comparison_table(summaries))
    return save_figure(plot_runs(curves), path if path is not None else "comparison.png")


def print_comparison(runs: Sequence[str], path: str | None) -> None:
    """Compare runs, and print where the plot is."""
    click.echo(f"plot saved to {compare(runs, path)}")
