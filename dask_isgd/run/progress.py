"""What ``Run.wait`` calls with the latest values: a progress function, the notebook's card, callbacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from dask_isgd.callbacks.callback import Callback, CallbackRunner
from dask_isgd.display.live import LiveProgress
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
    run: Reporting, progress: Progress | bool, callbacks: Sequence[Callback]
) -> Iterator[Progress | None]:
    """Yield one function to call with the latest values, or None if nothing needs them.

    ``progress``: a function that shows them; True for the card of the run in a notebook, and elsewhere a bar on
    stderr, or lines if that is no terminal; False for nothing.
    """
    with ExitStack() as stack:
        card = NotebookProgress(run) if progress is True and in_notebook() else None
        show = card or (progress if callable(progress) else None)
        if progress is True and card is None:
            show = stack.enter_context(LiveProgress(sys.stderr))
        if card is not None:  # even after an error: a saved notebook shows this state
            stack.callback(lambda: card(run.latest))
        if callbacks:
            show = stack.enter_context(_with_callbacks(run, show, callbacks))
        yield show


@contextmanager
def _with_callbacks(run: Reporting, show: Progress | None, callbacks: Sequence[Callback]) -> Iterator[Progress]:
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
        runner.update(run.history, run.evaluations)
        try:
            summary = run.summary()
        except RunNotFoundError:  # it ended before its first report
            summary = {}
        runner.end(run.status, summary)
