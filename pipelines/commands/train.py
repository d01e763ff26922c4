"""``dask isgd train``: from a recipe to a trained run, on a cluster of its own or a running one."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dask_isgd.errors import IsgdError, MissingExtraError
from dask_isgd.pipelines import PIPELINES, Recipe
from dask_isgd.pipelines.commands.cluster import connector, no_warnings, quiet_logs
from dask_isgd.pipelines.commands.data import prepared_data
from dask_isgd.pipelines.commands.terminated import Terminated

if TYPE_CHECKING:
    from distributed import Client

    from dask_isgd.checks.request import PreparedRun
    from dask_isgd.run.run import Run
    from dask_isgd.storage import Dataset, RunDirectory

T = TypeVar("T")
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
    """Prepare the data, check everything, train, print a summary and save a plot if matplotlib is installed.

    A cluster on this machine is started before the checks, so that its workers import torch while this process does;
    any other one is used after them. With ``as_json`` stdout gets nothing but the line of JSON.
    """
    from dask_isgd.clusters import load_cluster
    from dask_isgd.runtime.imports import uncollected
    from dask_isgd.storage import Dataset, RunDirectory

    described = load_cluster(options.cluster) if options.cluster is not None else None
    if os.getcwd() not in sys.path:  # a recipe's own modules usually lie beside it
        sys.path.append(os.getcwd())
    recipe = adjusted(options.recipe, options)
    run_dir = options.run_dir or default_run(options.name)
    RunDirectory(run_dir).former(resume=options.resume, overwrite=options.overwrite)
    data = Dataset(_dataset(options, recipe), group=None)
    validation = data.split(recipe.validation) if recipe.validation is not None else None
    loud = options.debug or options.scheduler is not None
    silent = nullcontext if loud else no_warnings
    with _signals(), nullcontext() if loud else quiet_logs(), ExitStack() as stack:
        with silent(), uncollected():
            connect = connector(stack, options.scheduler, described, options.workers)
        from dask_isgd.display.summary_table import print_summary
        from dask_isgd.pipelines.commands import show

        prepared = _prepare(options, recipe, run_dir, data, validation)
        with silent():
            outlives = options.scheduler is not None or (described is not None and described.kind == "scheduler")
            run = _train(connect(), prepared, run_dir, outlives=outlives)
            summary = {"status": run.status, **run.summary()}
            with _meanwhile(partial(_plot, run.directory, run_dir)) as plot:
                stack.close()  # here: Dask's clients close in the context in which they were entered
    print_summary({**summary, "run": run_dir}, sys.stderr if options.as_json else sys.stdout)
    click.echo(plot.result(), err=options.as_json)
    if options.as_json:
        click.echo(show.as_json({k: v for k, v in summary.items() if k != "status"}))


def _prepare(options: Options, recipe: Recipe, run_dir: str, data: Dataset, validation: Dataset | None) -> PreparedRun:
    """Check what needs no cluster."""
    from dask_isgd.runtime.imports import uncollected

    with uncollected():
        from dask_isgd.checks.request import RunRequest, prepare
    request = RunRequest(
        model=recipe.model,
        data=data,
        run_dir=run_dir,
        loss=recipe.loss,
        learning=recipe.learning,
        scoring=recipe.scoring,
        sampling=recipe.sampling,
        validation=validation,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    return prepare(request)


def _train(client: Client, prepared: PreparedRun, run_dir: str, *, outlives: bool) -> Run:
    """Train to the end of the run. Raises the error that ended it, or IsgdError."""
    from dask_isgd.run.api import start

    run = start(client, prepared)
    click.echo(f"run {run_dir}, dashboard {run.dashboard_link}", err=True)
    _follow(run, run_dir, prepared.spec.learning.steps, outlives=outlives)
    if run.status == "failed":
        raise IsgdError(f"run {run_dir} failed; `dask isgd status {run_dir}` shows its progress")
    return run


def _plot(directory: RunDirectory, run_dir: str) -> str:
    """Save the plot of a run, and return a message; a plot that needs a package is no reason to fail at the end."""
    from dask_isgd.pipelines.commands import show

    try:
        return f"plot saved to {show.save_plot(directory, run_dir)}"
    except MissingExtraError as error:
        return f"no plot saved: {error}"


@contextmanager
def _meanwhile(work: Callable[[], T]) -> Iterator[Future[T]]:
    """Have a thread do the work while the body runs; raises its error at the end."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        yield done
        done.result()


def _dataset(options: Options, recipe: Recipe) -> str:
    """Return the URL of the recipe's dataset; a pipeline's dataset is prepared first."""
    pipeline = PIPELINES.get(recipe.data)
    if pipeline is None:
        return options.data or recipe.data
    return prepared_data(pipeline, options.data, options.source)


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
