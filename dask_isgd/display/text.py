"""Numbers, fractions, gains and durations as text for people.

A value that is missing, None or NaN is shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from dask_isgd.columns import COLUMNS

DASH = "–"
FIGURES = ("loss", "validation_error", "gain", "steps_per_second", "scored_per_second", "mean_age")
"""The main figures in the order of their importance; without classes the validation loss takes the error's place."""
_MORE = ("noise_scale", "gate")


def known(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """Return a number with grouped thousands and ``digits`` significant digits.

    >>> number(1234567), number(0.012345), number(float("nan"))
    ('1,234,567', '0.0123', '–')
    """
    if not known(value):
        return DASH
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: Any) -> str:
    """Return a fraction as a percentage with two decimals.

    >>> percent(0.0317)
    '3.17 %'
    """
    return f"{100 * value:.2f} %" if known(value) else DASH


def factor(value: Any) -> str:
    """Return a ratio with two decimals: ``1.83×``."""
    return f"{value:.2f}×" if known(value) else DASH


def switch(value: Any) -> str:
    """Return ``"open"`` for 1 and ``"closed"`` for 0."""
    return {1: "open", 0: "closed"}.get(value, DASH)


def duration(value: Any) -> str:
    """Return seconds in the units that suit them.

    >>> duration(7.31), duration(75), duration(7384)
    ('7.3 s', '1 min 15 s', '2 h 3 min')
    """
    if not known(value):
        return DASH
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def noise_scale(scale: Any, batch_size: Any) -> str:
    """Return a noise scale beside the minibatch size.

    >>> noise_scale(812.4, 64), noise_scale(20.0, 64)
    ('812 (minibatch 64)', '20 (minibatch 64: variance is not what holds training back)')
    """
    if not known(scale) or not known(batch_size):
        return number(scale)
    below = ": variance is not what holds training back" if scale < batch_size else ""
    return f"{number(scale)} (minibatch {number(int(batch_size))}{below})"


_FORMATS = {"fraction": percent, "ratio": factor, "switch": switch, "seconds": duration}


def figure(name: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the label of a column of ``Run.latest`` and its value as text."""
    column = COLUMNS[name]
    if name == "noise_scale":
        step, examples = values.get("step"), values.get("examples")
        batch_size = round(examples / step) if known(examples) and known(step) and step else None
        return column.label, noise_scale(values.get(name), batch_size)
    text = _FORMATS.get(column.unit, number)(values.get(name))
    if name in ("validation_error", "validation_loss") and text != DASH:
        text += at_step(values.get("evaluated"), values.get("step"))
    return column.label, text


def at_step(evaluated: Any, step: Any) -> str:
    """Return the step of an evaluation that is older than the step shown beside it.

    >>> at_step(300, 450), at_step(450, 450)
    (' at step 300', '')
    """
    return f" at step {number(int(evaluated))}" if known(evaluated) and known(step) and evaluated < step else ""


def figures(values: Mapping[str, Any], *, more: bool = False) -> list[tuple[str, str]]:
    """Return the main figures of a run as (label, text), in the order of every display.

    ``more``: those that need room, too.
    """
    without_classes = known(values.get("validation_loss")) and not known(values.get("validation_error"))
    names = [*FIGURES, *(_MORE if more else ())]
    return [
        figure("validation_loss" if name == "validation_error" and without_classes else name, values) for name in names
    ]


def figures_line(values: Mapping[str, Any], width: float = math.inf) -> str:
    """Return the main figures that are known in one line, the first ones only if it has less ``width``."""
    line = ""
    for name, text in figures(values):
        longer = f"{line}  {name} {text}".strip() if text != DASH else line
        if len(longer) > width:
            break
        line = longer
    return line


def steps_of(values: Mapping[str, Any]) -> str:
    """Return the step and the run's number of steps, if it is known.

    >>> steps_of({"step": 1200, "steps": 8000}), steps_of({})
    ('step 1,200 of 8,000', 'step 0')
    """
    of = f" of {number(values['steps'])}" if values.get("steps") else ""
    return f"step {number(values.get('step') or 0)}{of}"


def time_left(values: Mapping[str, Any]) -> str:
    """Return how long the remaining steps take at the present speed.

    >>> time_left({"step": 100, "steps": 700, "steps_per_second": 10.0}), time_left({"step": 3})
    ('1 min 0 s', '–')
    """
    step, steps, speed = values.get("step"), values.get("steps"), values.get("steps_per_second")
    if not (known(step) and known(steps) and known(speed) and speed > 0):
        return DASH
    return duration(max(0, steps - step) / speed)
