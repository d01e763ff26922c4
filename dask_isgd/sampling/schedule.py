"""Which chunks to score next: pure functions of what is known of each chunk."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike

PROBE_SHARE = 0.05
"""Share of the chunks, and of the scorers' time, that go on being scored while the gate is closed."""


def next_chunks(
    versions: ArrayLike, in_flight: Collection[int], k: int, among: Collection[int] | None = None
) -> list[int]:
    """Up to ``k`` chunks to score, the oldest version first: round robin.

    ``versions`` (n_chunks,) with NaN for never scored, which comes before all; chunks ``in_flight``, and
    those not ``among`` the given, are left out; ties go to the lower index.
    """
    age_order = np.asarray(versions, np.float64).copy()
    age_order[np.isnan(age_order)] = -np.inf
    waiting = set(in_flight)
    candidates = np.arange(len(age_order)) if among is None else np.unique(np.fromiter(among, np.int64, len(among)))
    ranked = candidates[np.argsort(age_order[candidates], kind="stable")[: max(0, k) + len(waiting)]]
    return [chunk for chunk in ranked.tolist() if chunk not in waiting][: max(0, k)]


def probe_chunks(n_chunks: int) -> list[int]:
    """The chunks that are scored while the gate is closed, evenly spaced: always the same.

    Few chunks, as fresh as all would be, tell what importance sampling would gain; all chunks, twenty times
    staler, would tell that it does not pay because it is not done.
    """
    count = max(1, round(PROBE_SHARE * n_chunks)) if n_chunks else 0
    return [(2 * i + 1) * n_chunks // (2 * count) for i in range(count)]
