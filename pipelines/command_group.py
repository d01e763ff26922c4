"""The group ``dask isgd``, and what all of its commands share: ``--debug``, errors as one message, exit codes.

It imports no torch and no Zarr, so that ``--help`` stays fast.
"""

from __future__ import annotations

import atexit
import functools
import gc
import signal
from collections.abc import Callable
from typing import Any

import click

from dask_isgd.errors import IsgdError
from dask_isgd.pipelines.commands.terminated import Terminated
from dask_isgd.pipelines.commands.wording import as_options

_DEBUG = "dask_isgd.debug"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def isgd() -> None:
    """Importance-sampled SGD for data in Zarr."""
    atexit.register(gc.freeze)  # the collections with which the interpreter ends take 0.3 s after torch


def clean(command: Callable[..., None]) -> Callable[..., None]:
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


def debugging() -> bool:
    """Return whether the current command was given ``--debug``."""
    return bool(click.get_current_context().meta[_DEBUG])
