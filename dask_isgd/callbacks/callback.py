"""The interface of a callback, and the class that calls it."""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dask_isgd.extras import needs

if TYPE_CHECKING:
    import xarray as xr

logger = logging.getLogger(__name__)

_INTERVAL = 5.0
_EVALUATION = {"loss": "validation_loss", "error": "validation_error"}


class Callback:
    """What a tool receives from a run. Subclasses override the methods they need; these do nothing.

    An error in a callback is logged and ends that callback, but never the wait.
    """

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        """Receive the run's name and its settings, flat, as ``learning.steps``; this is called first."""

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the finite values of a row of the history, or ``validation_loss`` and ``validation_error``.

        Steps never decrease: those that a restarted learner repeats are not reported again.
        """

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Receive the run's current status (it may still be running) and ``Run.summary()``, flat; called last."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with keys joined by dots.

    >>> flat({"learning": {"steps": 5}, "name": "x"})
    {'learning.steps': 5, 'name': 'x'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def rows(
    dataset: xr.Dataset, after: float, names: Mapping[str, str] | None = None
) -> list[tuple[int, dict[str, float]]]:
    """Return (step, finite values) of every row after a step; ``names``: which columns, and their new names."""
    if "step" not in dataset.coords:
        return []
    columns = {str(name): dataset[name].values for name in dataset.data_vars if names is None or name in names}
    found = []
    for i, step in enumerate(dataset["step"].values):
        if step > after:
            values = {(names or {}).get(name, name): float(column[i]) for name, column in columns.items()}
            found.append((int(step), {name: value for name, value in values.items() if math.isfinite(value)}))
    return found


class CallbackRunner:
    """Passes on to callbacks what a run has written since the last time."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)
        self._last = {"report": -1.0, "evaluation": -1.0}
        self._updated = -math.inf

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        """Begin every callback."""
        self._call("begin", run, flat(settings))

    @property
    def due(self) -> bool:
        """Whether it is time for `update`, for which the caller must read the history from disk."""
        return bool(self._callbacks) and time.monotonic() - self._updated >= _INTERVAL

    def update(self, history: xr.Dataset, evaluations: xr.Dataset) -> None:
        """Report the new rows."""
        self._updated = time.monotonic()
        reports = rows(history, self._last["report"])
        evaluated = rows(evaluations, self._last["evaluation"], _EVALUATION)
        self._last["report"] = reports[-1][0] if reports else self._last["report"]
        self._last["evaluation"] = evaluated[-1][0] if evaluated else self._last["evaluation"]
        for step, values in sorted(reports + evaluated, key=lambda row: row[0]):
            self._call("report", step, values)

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """End every callback."""
        self._call("end", status, flat(summary))

    def _call(self, method: str, *arguments: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, method)(*arguments)
            except Exception:
                logger.exception("%s failed and receives nothing more from this run", type(callback).__name__)
                self._callbacks.remove(callback)


def require(module: str, extra: str) -> Any:
    """Return an optional module; raises MissingExtraError with how to install it."""
    with needs(extra, "this callback"):
        return importlib.import_module(module)
