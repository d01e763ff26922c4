"""The interface of a callback, and how one is fed."""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dask_isgd.errors import ConfigError

if TYPE_CHECKING:
    import xarray as xr

logger = logging.getLogger(__name__)

_LOOK_EVERY = 5.0
_EVALUATION = {"loss": "validation_loss", "error": "validation_error"}


class Callback:
    """What a tool hears of a run. Subclasses override what they need; the methods here do nothing.

    An error in a callback is logged and ends that callback, never the waiting.
    """

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        """Before anything else: the run's name and its settings, flat, as ``learning.steps``."""

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Finite values of one row of the history, or ``validation_loss`` and ``validation_error`` of a version.

        Steps never go back: those that a restarted learner takes again are not told again.
        """

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Last of all: the run's status now (it may go on) and ``Run.summary()``, flat."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots.

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
    """(step, finite values) of every row beyond a step; ``names``: the columns wanted, and what to call them."""
    if "step" not in dataset.coords:
        return []
    columns = {str(name): dataset[name].values for name in dataset.data_vars if names is None or name in names}
    found = []
    for i, step in enumerate(dataset["step"].values):
        if step > after:
            values = {(names or {}).get(name, name): float(column[i]) for name, column in columns.items()}
            found.append((int(step), {name: value for name, value in values.items() if math.isfinite(value)}))
    return found


class Feeder:
    """Feeds callbacks what a run has written since the last time."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)
        self._last = {"report": -1.0, "evaluation": -1.0}
        self._looked = -math.inf

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        self._tell("begin", run, flat(settings))

    @property
    def due(self) -> bool:
        """Whether it is time to look again; a look reads the history from disk."""
        return bool(self._callbacks) and time.monotonic() - self._looked >= _LOOK_EVERY

    def look(self, history: xr.Dataset, evaluations: xr.Dataset) -> None:
        """Report what is new."""
        self._looked = time.monotonic()
        reports = rows(history, self._last["report"])
        evaluated = rows(evaluations, self._last["evaluation"], _EVALUATION)
        self._last["report"] = reports[-1][0] if reports else self._last["report"]
        self._last["evaluation"] = evaluated[-1][0] if evaluated else self._last["evaluation"]
        for step, values in sorted(reports + evaluated, key=lambda row: row[0]):
            self._tell("report", step, values)

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        self._tell("end", status, flat(summary))

    def _tell(self, what: str, *arguments: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, what)(*arguments)
            except Exception:
                logger.exception("%s failed and hears no more of this run", type(callback).__name__)
                self._callbacks.remove(callback)


def need(module: str, extra: str) -> Any:
    """An optional module, or ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is not installed ({error}); pip install 'dask_isgd[{extra}]'") from error
