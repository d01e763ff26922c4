"""The command line: ``dask isgd``, or ``python -m dask_isgd``.

This module handles only the options. It imports the commands when they run, so that ``--help`` stays fast: it
imports no torch and no Zarr.
"""

from __future__ import annotations

import atexit
import functools
import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dask_isgd.errors import IsgdError
from dask_isgd.names import nearest
from dask_isgd.pipelines import PIPELINES, Recipe, load_recipe
from dask_isgd.pipelines.commands.terminated import Terminated
from dask_isgd.pipelines.commands.wording import as_options

_DEBUG = "dask_isgd.debug"


def _clean(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--debug``; print an IsgdError as one message, with exit code 1; exit with 130 on Ctrl-C, 143 on SIGTERM."""

    @click.option("--debug", is_flag=True, help="Show tracebacks and Dask's log messages.")
    @functools.wraps(command)
    def wrapped(*, debug: bool, **options: Any) -> None:
        click.get_current_context().meta[_DEBUG] = debug
        try:
            command(**options)
        except IsgdError as error:
            if debug:
                raise
            raise click.ClickException(as_options(str(error))) from error
        except Terminated:
            raise SystemExit(128 + signal.SIGTERM) from None
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None

    return wrapped


def _pipelines() -> str:
    return "\n".join(f"  {name:<15}{pipeline.about}" for name, pipeline in PIPELINES.items())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def isgd() -> None:
    """Importance-sampled SGD for data in Zarr."""
    atexit.register(gc.freeze)  # the collections with which the interpreter ends take 0.3 s after torch


class _NameOrData(click.Choice[str]):
    """The name of a pipeline, a YAML file, or the path or URL of data."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self.choices or "://" in value or Path(value).exists():
            return value
        if "/" not in value and "." not in value:
            return super().convert(value, param, ctx)
        if not Path(value).is_file():
            self.fail(f"there is no file {value!r}; check the path.", param, ctx)
        return value


@isgd.command(
    short_help="Write a public dataset, or your own data.",
    help="Write a public dataset, or your own data described by a recipe, as Zarr.\n\n"
    f"\b\nNAME is one of\n{_pipelines()}\n\n"
    "A RECIPE.yaml sets `source:` (xarray, zarr, numpy, images, parquet or csv), `inputs:`, `target:`, `splits:` and "
    "more. DATA is the path or URL of a Zarr group, an .nc, .npz, .parquet or .csv file, or a folder of images.",
)
@click.argument("name", type=_NameOrData(list(PIPELINES)), metavar="NAME|RECIPE.yaml|DATA")
@click.option("--to", "url", metavar="URL", help="Path or URL of the dataset.  [default: data/NAME.zarr]")
@click.option("--from", "source", metavar="PATH", help="Folder with the original files of NAME.")
@click.option("--input", "inputs", multiple=True, metavar="NAME", help="An input of DATA; may be repeated.")
@click.option("--target", metavar="NAME", help="The target of DATA.  [default: target, label or y]")
@_clean
def prepare(name: str, url: str | None, source: str | None, inputs: tuple[str, ...], target: str | None) -> None:
    if source is not None and name not in PIPELINES:
        raise click.UsageError("--from is for the data sets that are listed above; pass the path of your data itself.")
    if (inputs or target) and (name in PIPELINES or name.endswith((".yaml", ".yml"))):
        raise click.UsageError("--input and --target are for DATA; a RECIPE.yaml has them inside.")
    from dask_isgd.pipelines.commands.prepare import prepare as run

    click.echo(run(name, url, source=source, inputs=list(inputs) or None, target=target))


def _recipe(_: click.Context, __: click.Parameter, value: str) -> Recipe:
    if value in PIPELINES:
        return PIPELINES[value].recipe
    if value.endswith((".yaml", ".yml")):
        if not Path(value).is_file():
            raise click.BadParameter(f"there is no file {value!r}; check the path.")
        return load_recipe(value, {name: pipeline.recipe for name, pipeline in PIPELINES.items()})
    close = nearest(value, PIPELINES)
    hint = f"Did you mean {close!r}?" if close else f"Pass {', '.join(PIPELINES)} or a RECIPE.yaml."
    raise click.BadParameter(f"got {value!r}. {hint}")


@isgd.command(
    help=f"Train a model and see whether importance sampling pays.\n\n\b\nNAME is one of\n{_pipelines()}\n\n"
    "Ctrl-C does not end the training: it prints how to watch and stop the run, which continues. A second "
    "Ctrl-C within three seconds stops the run after a last checkpoint, and a third one leaves immediately. "
    "--resume continues a stopped run."
)
@click.argument("what", metavar="NAME|RECIPE.yaml")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a running Dask cluster.  [default: start a cluster on this machine]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Number of worker processes to start on this machine.")
@click.option(
    "--cluster", metavar="YAML", help="File that describes the cluster to start or use; see docs/clusters.md."
)
@click.option(
    "--run", "run_dir", metavar="DIR", help="Path or URL of the run directory.  [default: runs/NAME-DATE-TIME]"
)
@click.option("--data", metavar="URL", help="Path or URL of the dataset.  [default: data/NAME.zarr]")
@click.option("--from", "source", metavar="PATH", help="Folder with the dataset's original files.")
@click.option("--steps", type=click.IntRange(min=1), help="Number of optimizer updates.  [default: the recipe's]")
@click.option(
    "--seed", type=click.IntRange(min=0), help="Seed of the parameters and the draws.  [default: the recipe's]"
)
@click.option("--uniform", is_flag=True, help="Draw uniformly and score nothing, as a baseline.")
@click.option("--synchronous", is_flag=True, help="Wait for fresh scores, so that the same seed gives the same bits.")
@click.option("--resume", is_flag=True, help="Resume the run in --run from its latest checkpoint.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --run and start a new one.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the results as one line of JSON on stdout; everything else goes to stderr.",
)
@_clean
def train(what: str, **options: Any) -> None:
    given = {name for name, value in options.items() if value}
    clusters = (("scheduler", "workers"), ("cluster", "scheduler"), ("cluster", "workers"))
    for one, other in (*clusters, ("resume", "overwrite"), ("uniform", "synchronous")):
        if {one, other} <= given:
            raise click.UsageError(f"--{one} and --{other} cannot be used together; pass one of them.")
    if "resume" in given and "run_dir" not in given:
        raise click.UsageError("--resume needs --run DIR, the run to resume.")
    context = click.get_current_context()
    recipe = _recipe(context, context.command.params[0], what)
    from dask_isgd.pipelines.commands import train as training

    name = what if what in PIPELINES else Path(what).stem
    training.train(training.Options(name=name, recipe=recipe, debug=context.meta[_DEBUG], **options))


@isgd.command()
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of a table.")
@click.option("--watch", is_flag=True, help="Update until the run has ended; Ctrl-C stops watching, not the run.")
@click.option(
    "--every", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two updates."
)
@_clean
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
@_clean
def verify(run: str, as_json: bool) -> None:
    """Check everything in the directory RUN, and show what a resumed run would lose.

    Changes nothing. Exits with 1 if anything is damaged.
    """
    from dask_isgd.pipelines.commands.verify import verify_run

    if verify_run(run, as_json=as_json):
        raise SystemExit(1)


@isgd.command()
@click.option("--scheduler", metavar="ADDRESS", help="Address of a running Dask cluster to look at.")
@click.option("--data", metavar="URL", help="Path or URL of a dataset to open.")
@click.option("--run", metavar="DIR", help="Path or URL where a run directory should be writable.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of text.")
@_clean
def doctor(**options: Any) -> None:
    """Show versions, devices, threads and allocator; try a cluster and stores.

    A bug report needs its output. Exits with 1 if anything is wrong.
    """
    from dask_isgd.pipelines.commands.doctor import doctor

    if doctor(**options):
        raise SystemExit(1)


@isgd.command()
@click.argument("run", metavar="RUN")
@_clean
def stop(run: str) -> None:
    """Stop the run in the directory RUN after a last checkpoint.

    Works on every machine that can write to the directory; `train --resume` resumes the run.
    """
    from dask_isgd.pipelines.commands.control import request

    click.echo(request(run, "stop"))


@isgd.command()
@click.argument("run", metavar="RUN")
@_clean
def pause(run: str) -> None:
    """Pause the run in the directory RUN after a checkpoint; it keeps its workers."""
    from dask_isgd.pipelines.commands.control import request

    click.echo(request(run, "pause"))


@isgd.command()
@click.argument("run", metavar="RUN")
@_clean
def unpause(run: str) -> None:
    """Continue the paused run in the directory RUN."""
    from dask_isgd.pipelines.commands.control import request

    click.echo(request(run, "run"))


@isgd.command("list")
@click.argument("folder", metavar="[FOLDER]", default="runs")
@_clean
def list_runs(folder: str) -> None:
    """List the runs in FOLDER, `runs` by default, the latest first."""
    from dask_isgd.pipelines.commands import compare

    compare.list_runs(folder)


@isgd.command(short_help="Compare runs in a table and a plot.")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option("--to", "path", metavar="FILE", help="The .png, .svg or .pdf file to write.  [default: comparison.png]")
@_clean
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
@_clean
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
@_clean
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

    one_pass(Options(method=method, debug=click.get_current_context().meta[_DEBUG], **options))


@isgd.command(short_help="Write a score of every example.")
@_over_data
@click.option("--method", type=click.Choice(["exact", "bound", "loss"]), default="exact", show_default=True)
@_clean
def score(method: str, **options: Any) -> None:
    """Write gradient norms or losses of the run's latest checkpoint, one per example.

    If it is interrupted, the same command does what is left.
    """
    _one_pass(method, **options)


@isgd.command(short_help="Write the model's output for every example.")
@_over_data
@_clean
def predict(**options: Any) -> None:
    """Write the outputs of the run's latest checkpoint, one row per example.

    If it is interrupted, the same command does what is left.
    """
    _one_pass(None, **options)
