"""Errors of the library on their way from a task to a person: a sentence says everything, tracebacks are left out."""

from __future__ import annotations

import logging

from dask_isgd import errors
from dask_isgd.errors import IsgdError

_FAILED = "Compute Failed"
_CANCELLED = "Async instruction for ", "ended with CancelledError"
"""How messages of Dask's workers begin (and end): of a task that failed, of one that was cut short."""


def log_in_one_line() -> None:
    """Have this process log the IsgdError of a task in one line, for the client raises it.

    Tasks that were cut short because their worker closed are not logged.
    """
    for name in ("distributed.worker", "distributed.worker.state_machine"):
        logging.getLogger(name).addFilter(_keep)  # the same one again changes nothing


def _keep(record: logging.LogRecord) -> bool:
    message = str(record.msg)
    if message.startswith(_CANCELLED[0]) and message.endswith(_CANCELLED[1]):
        return False
    if message.startswith(_FAILED) and isinstance(record.args, tuple) and len(record.args) > 3:
        key, exception = record.args[0], str(record.args[3])
        if is_ours(exception.partition("(")[0]):
            record.msg, record.args = "%s failed: %s", (key, exception)
    return True


def is_ours(name: str) -> bool:
    """Return whether the name is that of an error of the library."""
    kind = getattr(errors, name, None)
    return isinstance(kind, type) and issubclass(kind, IsgdError)


def in_one_sentence(error: BaseException) -> BaseException:
    """Return a task's error without the frames of the worker, if it is an IsgdError.

    What caused it is kept if it is somebody else's: an exception of a user's model or loss, and not one of the disk.
    """
    if isinstance(error, IsgdError):
        if isinstance(error.__cause__, OSError):
            error.__cause__ = None
        return error.with_traceback(None)
    return error
