"""Imports that take seconds: early, in a thread, and without the garbage collector."""

from __future__ import annotations

import gc
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

THREAD = "isgd-imports"
"""The name of the threads that import early."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector, which takes a seventh of the time of the imports and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def exit_quickly() -> None:
    """Spare the interpreter its last collections, which take 0.2 to 0.4 s after torch; call this at the very end."""
    gc.freeze()


def import_early(*modules: str, then: Callable[[], object] | None = None) -> None:
    """Import modules in a thread, then call ``then``; what fails is logged, and fails again where it is needed."""

    def run() -> None:
        try:
            with uncollected():
                for module in modules:
                    importlib.import_module(module)
                if then is not None:
                    then()
                gc.freeze()  # half a million objects that live as long as the process: no later collection visits them
        except Exception:
            logger.exception("modules cannot be imported early")

    threading.Thread(target=run, name=THREAD, daemon=True).start()
