"""Numbers, shares, gains and durations as text for people.

A value that is missing, None or NaN is shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

DASH = "–"


def _known(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A number for people: thousands set apart, ``digits`` significant digits, a dash for none.

    >>> number(1234567), number(0.012345), number(float("nan"))
    ('1,234,567', '0.0123', '–')
    """
    if not _known(value):
        return DASH
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: Any) -> str:
    """A share as a percentage with two decimals.

    >>> percent(0.0317)
    '3.17 %'
    """
    return f"{100 * value:.2f} %" if _known(value) else DASH


def factor(value: Any) -> str:
    """A gain: ``1.83×``."""
    return f"{value:.2f}×" if _known(value) else DASH


def duration(value: Any) -> str:
    """Seconds for people.

    >>> duration(7.31), duration(75), duration(7384)
    ('7.3 s', '1 min 15 s', '2 h 3 min')
    """
    if not _known(value):
        return DASH
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def measures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The newest measures of a run, as (name, text) in the order of every display."""
    return [
        ("loss", number(values.get("loss"))),
        ("test error", percent(values.get("validation_error"))),
        ("gain", factor(values.get("gain"))),
        ("steps/s", number(values.get("steps_per_second"))),
        ("scored/s", number(values.get("scored_per_second"))),
        ("age", number(values.get("mean_age"))),
    ]
