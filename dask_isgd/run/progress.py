"""What ``Run.wait`` calls with the latest values: a progress function, the notebook's card, callbacks."""

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


class Reporting(Shown, Protocol):
    """What reports its progress, such as a ``Run``."""

    document: dict[str, Any]

    @property
    def history(self) -> xr.Dataset: ...
    @property
    def evaluations(self) -> xr.Dataset: ...
    def summary(self) -> Mapping[str, Any]: ...


@contextmanager
def progress_calls(
    run: Reporting, progress: Progress | None, callbacks: Sequence[Callback]
) -> Iterator[Progress | None]:
    """Yield one function to call with the latest values, or None if nothing needs them.

    In a notebook this shows the card of the run, unless ``progress`` is given.
    """
    card = NotebookProgress(run) if progress is None and in_notebook() else None
    show = card or progress
    if not callbacks:
        try:
            yield show
        finally:
            if card is not None:  # even after an error: a saved notebook shows this state
                card(run.latest)
        return
    runner = CallbackRunner(callbacks)
    runner.begin(run.name, run.document.get("config", {}))

    def call(values: Mapping[str, Any]) -> None:
        if show is not None:
            show(values)
        if runner.due:
            runner.update(run.history, run.evaluations)

    try:
        yield call
    finally:
        if card is not None:
            card(run.latest)
        runner.update(run.history, run.evaluations)
        try:
            summary = run.summary()
        except RunNotFoundError:  # it ended before its first report
            summary = {}
        runner.end(run.status, summary)
