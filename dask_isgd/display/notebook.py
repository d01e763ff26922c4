"""A run in a notebook: a card that is updated in place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from dask_isgd.display.html import card
from dask_isgd.display.text import figures_line, steps_of


class Shown(Protocol):
    """What can be shown, such as a ``Run``."""

    name: str

    @property
    def status(self) -> str: ...
    @property
    def latest(self) -> Mapping[str, Any]: ...


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookProgress:
    """The card of a run, updated in place during ``Run.wait``; a saved notebook keeps its last state."""

    def __init__(self, run: Shown) -> None:
        from IPython.display import display

        self._run = run
        self._handle = display(  # type: ignore[no-untyped-call]
            self._bundle(run.latest), raw=True, display_id=True
        )

    def __call__(self, values: Mapping[str, Any]) -> None:
        self._handle.update(self._bundle(values), raw=True)

    def _bundle(self, values: Mapping[str, Any]) -> dict[str, str]:
        status = self._run.status
        plain = f"run {self._run.name}  {status}  {steps_of(values)}  {figures_line(values)}"
        return {"text/html": card(self._run.name, status, values), "text/plain": plain}
