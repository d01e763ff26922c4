"""Ctrl-C during ``Run.wait``: the first one stops the waiting, a second one within a few seconds stops the run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol

from dask_isgd.errors import WaitTimeoutError


class Watchable(Protocol):
    """What can be watched, such as a ``Run``."""

    def watch(self, timeout: float | None = None) -> Iterable[Any]: ...


def next_interrupt(run: Watchable, seconds: float, message: str) -> KeyboardInterrupt | None:
    """Print ``message`` on stderr; return the interrupt that comes within ``seconds`` and before the run ends.

    A subclass of KeyboardInterrupt, such as the command line's for SIGTERM, counts and is returned as it is.
    """
    try:
        print(message, file=sys.stderr, flush=True)
        for _ in run.watch(seconds):
            pass
    except WaitTimeoutError:
        return None
    except KeyboardInterrupt as again:
        return again
    return None
