"""The command line: ``dask isgd``, or ``python -m dask_isgd``.

This module handles only the options of what makes data and runs; ``run_commands`` those of what reads and steers a
run. Commands are imported when they run, so that ``--help`` stays fast: it imports no torch and no Zarr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dask_isgd.names import nearest
from dask_isgd.pipelines import PIPELINES, Recipe, load_recipe, run_commands
from dask_isgd.pipelines.command_group import clean, debugging, isgd

__all__ = ["isgd", "run_commands"]


def _pipelines() -> str:
    return "\n".join(f"  {name:<15}{pipeline.about}" for name, pipeline in PIPELINES.items())


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
@clean
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
@click.option(
    "--data",
    metavar="URL",
    help="Path or URL of the dataset; if nothing is there, the dataset NAME is written there first.  "
    "[default: data/NAME.zarr]",
)
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
@clean
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
    training.train(training.Options(name=name, recipe=recipe, debug=debugging(), **options))


@isgd.command()
@click.option("--scheduler", metavar="ADDRESS", help="Address of a running Dask cluster to look at.")
@click.option("--data", metavar="URL", help="Path or URL of a dataset to open.")
@click.option("--run", metavar="DIR", help="Path or URL where a run directory should be writable.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of text.")
@clean
def doctor(**options: Any) -> None:
    """Show versions, devices, threads and allocator; try a cluster and stores.

    A bug report needs its output. Exits with 1 if anything is wrong.
    """
    from dask_isgd.pipelines.commands.doctor import doctor

    if doctor(**options):
        raise SystemExit(1)
