"""Which chunks to score next: pure functions of the versions they were last scored at."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike

PROBE_SHARE = 0.05
"""Share of the chunks, and of the scorers' time, that scoring continues with while the gate is closed."""


def next_chunks(
    versions: ArrayLike, in_flight: Collection[int], k: int, among: Collection[int] | None = None
) -> list[int]:
    """Return up to ``k`` chunks to score, the oldest version first: round robin.

    ``versions`` (n_chunks,) are NaN for chunks never scored, which come before all others. Chunks ``in_flight`` are
    left out, and so are those not in ``among``; ties go to the lower index.
    """
    order = np.asarray(versions, np.float64).copy()
    order[np.isnan(order)] = -np.inf
    excluded = set(in_flight)
    candidates = np.arange(len(order)) if among is None else np.unique(np.fromiter(among, np.int64, len(among)))
    ranked = candidates[np.argsort(order[candidates], kind="stable")[: max(0, k) + len(excluded)]]
    return [chunk for chunk in ranked.tolist() if chunk not in excluded][: max(0, k)]


def probe_chunks(n_chunks: int) -> list[int]:
    """Return the chunks that are scored while the gate is closed, evenly spaced: always the same.

    A few chunks, as fresh as all would be, show what importance sampling would gain. If all chunks were scored,
    but twenty times less often, importance sampling would seem not to pay only because it is not used.
    """
    count = max(1, round(PROBE_SHARE * n_chunks)) if n_chunks else 0
    return [(2 * i + 1) * n_chunks // (2 * count) for i in range(count)]
