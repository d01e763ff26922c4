"""``dask isgd score`` and ``dask isgd predict``: one pass of a run's latest checkpoint over a dataset."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import click

from dask_isgd.errors import ConfigError
from dask_isgd.pipelines.commands.cluster import connector, no_warnings, quiet_logs


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of both commands, under the same names."""

    run: str
    data: str
    to: str
    group: str | None = None
    model: str | None = None
    method: str | None = None
    """None: outputs, no scores."""
    scheduler: str | None = None
    workers: int | None = None
    overwrite: bool = False
    debug: bool = False


def one_pass(options: Options) -> None:
    """Write the scores or outputs, and print where they are."""
    from dask_isgd.storage import Dataset, RunDirectory

    if os.getcwd() not in sys.path:  # the model's module usually lies there
        sys.path.append(os.getcwd())
    name = options.model or str(RunDirectory(options.run).document("model")["model"]["name"])
    if ":" not in name:
        raise ConfigError(f"run {options.run}: got the model {name!r}, wanted 'package.module:name'; pass --model")
    data = Dataset(options.data, group=options.group)
    loud = options.debug or options.scheduler is not None
    with nullcontext() if loud else quiet_logs(), ExitStack() as stack, nullcontext() if loud else no_warnings():
        client = connector(stack, options.scheduler, None, options.workers)()
        from dask_isgd.loop.one_pass import predict, score
        from dask_isgd.run.api import attach

        module = attach(client, options.run, model=name).model()
        if options.method is None:
            predict(client, module, data, options.to, overwrite=options.overwrite)
        else:
            score(client, module, data, options.to, method=options.method, overwrite=options.overwrite)
    click.echo(options.to)
