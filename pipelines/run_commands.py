"""The options of the commands that read, compare, steer and use a run that exists, given by its directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dask_isgd.pipelines.command_group import clean, debugging, isgd


@isgd.command()
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of a table.")
@click.option("--watch", is_flag=True, help="Update until the run has ended; Ctrl-C stops watching, not the run.")
@click.option(
    "--every", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two updates."
)
@clean
def status(run: str, as_json: bool, watch: bool, every: float) -> None:
    """Show the progress of the run in the directory RUN.

    Reads only the directory: it needs no cluster and does not disturb the run.
    """
    from dask_isgd.pipelines.commands import show

    if watch:
        show.watch(run, as_json=as_json, every=every)
    else:
        show.status(run, as_json=as_json)


@isgd.command()
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of text.")
@clean
def verify(run: str, as_json: bool) -> None:
    """Check everything in the directory RUN, and show what a resumed run would lose.

    Changes nothing. Exits with 1 if anything is damaged.
    """
    from dask_isgd.pipelines.commands.verify import verify_run

    if verify_run(run, as_json=as_json):
        raise SystemExit(1)


@isgd.command()
@click.argument("run", metavar="RUN")
@clean
def stop(run: str) -> None:
    """Stop the run in the directory RUN after a last checkpoint.

    Works on every machine that can write to the directory; `train --resume` resumes the run.
    """
    from dask_isgd.pipelines.commands.control import request

    click.echo(request(run, "stop"))


@isgd.command()
@click.argument("run", metavar="RUN")
@clean
def pause(run: str) -> None:
    """Pause the run in the directory RUN after a checkpoint; it keeps its workers."""
    from dask_isgd.pipelines.commands.control import request

    click.echo(request(run, "pause"))


@isgd.command()
@click.argument("run", metavar="RUN")
@clean
def unpause(run: str) -> None:
    """Continue the paused run in the directory RUN."""
    from dask_isgd.pipelines.commands.control import request

    click.echo(request(run, "run"))


@isgd.command("list")
@click.argument("folder", metavar="[FOLDER]", default="runs")
@clean
def list_runs(folder: str) -> None:
    """List the runs in FOLDER, `runs` by default, the latest first."""
    from dask_isgd.pipelines.commands import compare

    compare.list_runs(folder)


@isgd.command(short_help="Compare runs in a table and a plot.")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option("--to", "path", metavar="FILE", help="The .png, .svg or .pdf file to write.  [default: comparison.png]")
@clean
def compare(runs: tuple[str, ...], path: str | None) -> None:
    """Print the summaries of the runs in the directories RUN side by side, and plot them all in the same panels.

    To see what importance sampling is worth, train once more with --uniform and compare.
    """
    from dask_isgd.pipelines.commands import compare as comparing
    from dask_isgd.pipelines.commands.show import FORMATS

    if len(runs) < 2:
        raise click.UsageError("compare needs at least two runs.")
    _require_suffix(path, FORMATS[:-1])
    comparing.print_comparison(runs, path)


@isgd.command(short_help="Export the trained parameters or the history.")
@click.argument("run", metavar="RUN")
@click.option(
    "--to", "path", metavar="FILE", required=True, help="A .safetensors file for the parameters, .csv for the history."
)
@clean
def export(run: str, path: str) -> None:
    """Write the latest parameters, or the history, of the run in the directory RUN as one file for other programs."""
    from dask_isgd.pipelines.commands import export as exporting

    _require_suffix(path, exporting.FORMATS)
    click.echo(exporting.export(run, path))


def _require_suffix(path: str | None, known: tuple[str, ...]) -> None:
    if path is not None and Path(path).suffix.lower() not in known:
        raise click.BadParameter(f"got {path!r}, wanted a file ending in {', '.join(known)}.", param_hint="--to")


@isgd.command(short_help="Save the plot of the run in the directory RUN.")
@click.argument("run", metavar="RUN")
@click.option(
    "--to", "path", metavar="FILE", help="The .png, .svg, .pdf or .html file to write.  [default: RUN/summary.png]"
)
@clean
def plot(run: str, path: str | None) -> None:
    """Plot loss, validation error, variance and gain of the run in the directory RUN."""
    from dask_isgd.pipelines.commands import show

    _require_suffix(path, show.FORMATS)
    click.echo(show.plot(run, path))


def _over_data(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments of a pass over a dataset."""
    options = (
        click.argument("run", metavar="RUN"),
        click.option("--data", metavar="URL", required=True, help="Path or URL of the dataset."),
        click.option("--group", metavar="NAME", help="Split of the dataset, such as train or test."),
        click.option("--to", metavar="URL", required=True, help="Path or URL of the Zarr group to write."),
        click.option("--model", metavar="PACKAGE:NAME", help="What builds the model.  [default: the run's]"),
        click.option("--scheduler", metavar="ADDRESS", help="Address of a running Dask cluster."),
        click.option("--workers", type=click.IntRange(min=1), help="Number of worker processes to start here."),
        click.option("--overwrite", is_flag=True, help="Replace the output of another pass."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _one_pass(method: str | None, **options: Any) -> None:
    if options["scheduler"] and options["workers"]:
        raise click.UsageError("--scheduler and --workers cannot be used together; pass one of them.")
    from dask_isgd.pipelines.commands.one_pass import Options, one_pass

    one_pass(Options(method=method, debug=debugging(), **options))


@isgd.command(short_help="Write a score of every example.")
@_over_data
@click.option("--method", type=click.Choice(["exact", "bound", "loss"]), default="exact", show_default=True)
@clean
def score(method: str, **options: Any) -> None:
    """Write gradient norms or losses of the run's latest checkpoint, one per example.

    If it is interrupted, the same command does what is left.
    """
    _one_pass(method, **options)


@isgd.command(short_help="Write the model's output for every example.")
@_over_data
@clean
def predict(**options: Any) -> None:
    """Write the outputs of the run's latest checkpoint, one row per example.

    If it is interrupted, the same command does what is left.
    """
    _one_pass(None, **options)
