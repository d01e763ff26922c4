"""Ctrl-C during ``Run.wait``: the first one stops the waiting, a second one within a few seconds stops the run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol

from dask_isgd.errors import WaitTimeoutError


class Watchable(Protocol):
    """What can be watched, such as a ``Run``."""

    def watch(self, timeout: float | None = None) -> Iterable[Any]: ...


def interrupted_again(run: Watchable, seconds: float, message: str) -> bool:
    """Print ``message`` on stderr and return whether Ctrl-C comes again within ``seconds``, before the run ends."""
    try:
        print(message, file=sys.stderr, flush=True)
        for _ in run.watch(seconds):
            pass
    except WaitTimeoutError:
        return False
    except KeyboardInterrupt:
        return True
    return False
