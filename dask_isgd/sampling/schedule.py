"""Which chunks to score next: pure functions of what is known of each chunk."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike, NDArray

PROBE_SHARE = 0.05
"""Share of the chunks, and of the scorers' time, that go on being scored while the gate is closed."""
MOST_HASTE = 2.0
"""A chunk counts as at most so many times older than it is, or younger."""


def next_chunks(
    versions: ArrayLike, in_flight: Collection[int], k: int, among: Collection[int] | None = None
) -> list[int]:
    """Up to ``k`` chunks to score, the oldest version first: round robin.

    ``versions`` (n_chunks,) with NaN for never scored, which comes before all; chunks ``in_flight``, and
    those not ``among`` the given, are left out; ties go to the lower index.
    """
    age_order = np.asarray(versions, np.float64).copy()
    age_order[np.isnan(age_order)] = -np.inf
    return _first(age_order, in_flight, k, among)


def restless_chunks(
    versions: ArrayLike,
    step: int,
    weights: ArrayLike,
    volatility: ArrayLike,
    in_flight: Collection[int],
    k: int,
    among: Collection[int] | None = None,
) -> list[int]:
    """Up to ``k`` chunks to score: the old ones first, sooner if they weigh much and change fast.

    What a chunk costs while it is stale grows with its share of the second moment and with how fast its
    norms move. Its age at ``step`` counts times the root of both, each in units of the mean over the chunks,
    but never more than twice nor less than half: while one chunk waits for its next turn, another
    has a turn only at a quarter of its age or more, so no chunk waits for long.

    ``versions`` (n_chunks,) as for ``next_chunks``; ``weights`` (n_chunks,) Σ w²; ``volatility`` (n_chunks,)
    how far the norms moved when last scored, such as stale over ideal less one; NaN where not known.
    """
    stamps = np.asarray(versions, np.float64)
    urgency = np.sqrt(_relative(weights) * _relative(volatility))
    haste = np.clip(urgency, 1.0 / MOST_HASTE, MOST_HASTE)
    age = np.maximum(step - stamps, 0.0) + 1.0  # scored just now: still ordered by haste
    order = np.where(np.isnan(stamps), -np.inf, -age * haste)
    return _first(order, in_flight, k, among)


def probe_chunks(n_chunks: int) -> list[int]:
    """The chunks that are scored while the gate is closed, evenly spaced: always the same.

    Few chunks, as fresh as all would be, tell what importance sampling would gain; all chunks, twenty times
    staler, would tell that it does not pay because it is not done.
    """
    count = max(1, round(PROBE_SHARE * n_chunks)) if n_chunks else 0
    return [(2 * i + 1) * n_chunks // (2 * count) for i in range(count)]


def _relative(values: ArrayLike) -> NDArray[np.float64]:
    """In units of the mean of what is known; one where it is not."""
    array = np.asarray(values, np.float64)
    known = np.isfinite(array)
    mean = array[known].mean() if known.any() else 0.0
    return np.where(known, np.maximum(array, 0.0), mean) / mean if mean > 0 else np.ones_like(array)


def _first(order: NDArray[np.float64], in_flight: Collection[int], k: int, among: Collection[int] | None) -> list[int]:
    waiting = set(in_flight)
    candidates = np.arange(len(order)) if among is None else np.unique(np.fromiter(among, np.int64, len(among)))
    ranked = candidates[np.argsort(order[candidates], kind="stable")[: max(0, k) + len(waiting)]]
    return [chunk for chunk in ranked.tolist() if chunk not in waiting][: max(0, k)]
