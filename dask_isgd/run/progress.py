"""Who is told while a run is waited for: a progress function, the notebook, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from dask_isgd.callbacks.callback import Callback, CallbackRunner
from dask_isgd.display.notebook import NotebookProgress, Shown, in_notebook
from dask_isgd.errors import RunNotFoundError

if TYPE_CHECKING:
    import xarray as xr

Progress = Callable[[Mapping[str, Any]], None]


class Followed(Shown, Protocol):
    """What can be followed: a ``Run``."""

    document: dict[str, Any]

    @property
    def history(self) -> xr.Dataset: ...
    @property
    def evaluations(self) -> xr.Dataset: ...
    def summary(self) -> Mapping[str, Any]: ...


@contextmanager
def following(run: Followed, progress: Progress | None, callbacks: Sequence[Callback]) -> Iterator[Progress | None]:
    """One function to call with the newest values; None where nobody wants to know.

    In a notebook a run that is waited for shows itself, unless ``progress`` is given.
    """
    card = NotebookProgress(run) if progress is None and in_notebook() else None
    tell = card or progress
    if not callbacks:
        try:
            yield tell
        finally:
            if card is not None:  # however it ended: this is what a saved notebook shows
                card(run.latest)
        return
    runner = CallbackRunner(callbacks)
    runner.begin(run.name, run.document.get("config", {}))

    def follow(values: Mapping[str, Any]) -> None:
        if tell is not None:
            tell(values)
        if runner.due:
            runner.update(run.history, run.evaluations)

    try:
        yield follow
    finally:
        if card is not None:
            card(run.latest)
        runner.update(run.history, run.evaluations)
        try:
            summary = run.summary()
        except RunNotFoundError:  # it ended before its first report
            summary = {}
        runner.end(run.status, summary)
