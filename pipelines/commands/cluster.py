"""The cluster of ``dask isgd train``: started on this machine, described by a file, or running already."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dask_isgd.errors import WaitTimeoutError

if TYPE_CHECKING:
    from distributed import Client

    from dask_isgd.clusters import ClusterConfig


def connector(
    stack: contextlib.ExitStack, scheduler: str | None, described: ClusterConfig | None, workers: int | None
) -> Callable[[], Client]:
    """Return a function that connects a client; the client and what is started end with the stack.

    With neither a scheduler's address nor a description, a cluster on this machine is started at once. Otherwise
    nothing happens before the function is called. It raises WaitTimeoutError if the scheduler does not reply.
    """
    if described is not None:
        return lambda: _described(stack, described)
    if scheduler is not None:
        return lambda: stack.enter_context(_running(scheduler))
    from dask_isgd.clusters import LocalCluster

    with _children_ignore_interrupts():
        cluster = stack.enter_context(LocalCluster(workers))
    return lambda: stack.enter_context(cluster.get_client())


def _described(stack: contextlib.ExitStack, described: ClusterConfig) -> Client:
    from dask_isgd.clusters import open_cluster

    with _children_ignore_interrupts():
        return stack.enter_context(open_cluster(described))


def _running(address: str) -> Client:
    from distributed import Client

    try:
        return Client(address)
    except (OSError, ValueError) as error:
        raise WaitTimeoutError(
            f"--scheduler: no reply from a Dask scheduler at {address!r} ({error}); is it running? "
            "Check the address, or omit the option to start a cluster on this machine"
        ) from error


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Silence Dask's logs here, and its logs and all warnings in the processes that are started meanwhile.

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
def no_warnings() -> Iterator[None]:
    """Ignore all warnings of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
