"""``dask isgd train``: from a recipe to a trained run, on a cluster of its own or a running one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dask_isgd.errors import IsgdError, WaitTimeoutError
from dask_isgd.names import named
from dask_isgd.pipelines import PIPELINES, Recipe
from dask_isgd.pipelines.commands.terminated import Terminated

if TYPE_CHECKING:
    from dask_isgd.clusters import ClusterConfig
    from dask_isgd.run.run import Run

_STOP_SECONDS = 30
_SECOND_INTERRUPT = 3.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command, under the same names."""

    name: str
    recipe: Recipe
    scheduler: str | None = None
    workers: int | None = None
    cluster: str | None = None
    run_dir: str | None = None
    data: str | None = None
    source: str | None = None
    steps: int | None = None
    seed: int | None = None
    uniform: bool = False
    synchronous: bool = False
    resume: bool = False
    overwrite: bool = False
    as_json: bool = False
    debug: bool = False


def default_data(name: str) -> str:
    """Return the default path of a pipeline's dataset."""
    return str(Path("data") / f"{name}.zarr")


def default_run(name: str) -> str:
    """Return a directory for a new run, named after the current time."""
    return str(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def adjusted(recipe: Recipe, options: Options) -> Recipe:
    """Return the recipe with the settings of the command line."""
    changes: dict[str, Any] = {k: v for k, v in (("steps", options.steps), ("seed", options.seed)) if v is not None}
    if options.synchronous:
        changes["synchronous"] = True
    learning = dataclasses.replace(recipe.learning, **changes)
    sampling = dataclasses.replace(recipe.sampling, uniform=True) if options.uniform else recipe.sampling
    return dataclasses.replace(recipe, learning=learning, sampling=sampling)


def train(options: Options) -> None:
    """Prepare the data, check everything, start a cluster, train, print a summary and save a plot.

    With ``as_json`` stdout gets nothing but the line of JSON.
    """
    from dask_isgd.checks.request import RunRequest, prepare
    from dask_isgd.clusters import load_cluster
    from dask_isgd.display.summary_table import print_summary
    from dask_isgd.pipelines.commands import show
    from dask_isgd.run.api import start
    from dask_isgd.storage import Dataset

    described = load_cluster(options.cluster) if options.cluster is not None else None
    if os.getcwd() not in sys.path:  # a recipe's own modules usually lie beside it
        sys.path.append(os.getcwd())
    recipe = adjusted(options.recipe, options)
    run_dir = options.run_dir or default_run(options.name)
    data = Dataset(_dataset(options, recipe), group=None)
    request = RunRequest(
        model=recipe.model,
        data=data,
        run_dir=run_dir,
        loss=named(recipe.loss) if recipe.loss is not None else None,
        learning=recipe.learning,
        scoring=recipe.scoring,
        sampling=recipe.sampling,
        validation=data.split(recipe.validation) if recipe.validation is not None else None,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    prepared = prepare(request)
    with _signals(), _cluster(options, described) as client:
        click.echo(f"run {run_dir}, dashboard {client.dashboard_link}", err=True)
        run = start(client, prepared)
        outlives = options.scheduler is not None or (described is not None and described.kind == "scheduler")
        _follow(run, run_dir, recipe.learning.steps, outlives=outlives)
        if run.status == "failed":
            raise IsgdError(f"run {run_dir} failed; `dask isgd status {run_dir}` shows its progress")
        summary = {"status": run.status, **run.summary()}
        plot = show.save_plot(run.history, run.evaluations, run_dir)
    print_summary({**summary, "run": run_dir}, sys.stderr if options.as_json else sys.stdout)
    click.echo(f"plot saved to {plot}", err=options.as_json)
    if options.as_json:
        click.echo(show.as_json({k: v for k, v in summary.items() if k != "status"}))


def _dataset(options: Options, recipe: Recipe) -> str:
    """Return the URL of the recipe's dataset; a pipeline's dataset is prepared first."""
    pipeline = PIPELINES.get(recipe.data)
    if pipeline is None:
        return options.data or recipe.data
    return pipeline.prepare(options.data or default_data(pipeline.name), source=options.source)


@contextmanager
def _cluster(options: Options, described: ClusterConfig | None) -> Iterator[Any]:
    """Yield a client of the running cluster, or of one that ends with the command."""
    from distributed import Client

    from dask_isgd.clusters import LocalCluster, open_cluster

    if described is not None:
        with contextlib.ExitStack() as stack:
            if not options.debug:
                stack.enter_context(_quiet())
            with _children_ignore_interrupts():
                client = stack.enter_context(open_cluster(described))
            yield client
        return

    if options.scheduler is not None:
        try:
            client = Client(options.scheduler)
        except (OSError, ValueError) as error:
            raise WaitTimeoutError(
                f"--scheduler: no reply from a Dask scheduler at {options.scheduler!r} ({error}); is it running? "
                "Check the address, or omit the option to start a cluster on this machine"
            ) from error
        with client:
            yield client
        return

    with nullcontext() if options.debug else _quiet():
        with _children_ignore_interrupts():
            cluster = LocalCluster(options.workers)
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Dask's logs and all warnings, here and in the processes that are started meanwhile.

    Every error that matters is raised here too. The workers are new interpreters, which read their logging from the
    environment.
    """
    loggers = [logging.getLogger(n) for n in ("distributed", "distributed.client", "tornado", "bokeh", "asyncio")]
    before = [logger.level for logger in loggers]
    added = {"DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical", "PYTHONWARNINGS": "ignore"}
    environment = {name: os.environ.get(name) for name in added}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which goes to the entire process group: the workers must commit a checkpoint.

    A child inherits ignored signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _signals() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that the run commits a checkpoint before it stops."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _follow(run: Run, run_dir: str, steps: int, *, outlives: bool) -> None:
    """Show the run until it has ended. Ctrl-C stops the waiting; another one within a few seconds stops the run.

    ``outlives``: the cluster outlives this command, so the run is left to it. Otherwise the run would end with the
    command, which therefore continues to wait.
    """
    from dask_isgd.checks.monitor import GOING
    from dask_isgd.display.live import LiveProgress
    from dask_isgd.run.interrupt import next_interrupt

    while True:
        try:
            with LiveProgress(sys.stderr, steps=steps) as progress:
                run.wait(progress=progress, second_interrupt=0)
            return
        except Terminated:
            _stop(run, run_dir)
            raise
        except KeyboardInterrupt:
            left = " and outlives this command" if outlives else ""
            message = (
                f"run {run_dir} continues{left}; press Ctrl-C again within {_SECOND_INTERRUPT:g} s to stop it. From "
                f"elsewhere: `dask isgd status {run_dir} --watch`, `dask isgd stop {run_dir}`"
            )
            again = next_interrupt(run, _SECOND_INTERRUPT, message)
            if again is not None:
                _stop(run, run_dir)
                raise again from None
            if outlives and run.status in GOING:
                run.detach()
                raise


def _stop(run: Run, run_dir: str) -> None:
    """Stop the run; the learner commits its last step. Another Ctrl-C leaves immediately."""
    click.echo("stopping: the learner commits a checkpoint (press Ctrl-C again to leave immediately)", err=True)
    try:
        run.stop(timeout=_STOP_SECONDS)
    except IsgdError as error:
        click.echo(str(error), err=True)
    click.echo(f"stopped; resume with --run {run_dir} --resume", err=True)
