"""Which chunks to score next: pure functions of the versions they were last scored at."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike

PROBE_SHARE = 0.05
"""Share of the scorers' time that scoring continues with while the gate is closed."""


def next_chunks(versions: ArrayLike, in_flight: Collection[int], k: int) -> list[int]:
    """Return up to ``k`` chunks to score, the oldest version first: round robin.

    ``versions`` (n_chunks,) are NaN for chunks never scored, which come before all others. Chunks ``in_flight`` are
    left out; ties go to the lower index.
    """
    order = np.asarray(versions, np.float64).copy()
    order[np.isnan(order)] = -np.inf
    excluded = set(in_flight)
    ranked = np.argsort(order, kind="stable")[: max(0, k) + len(excluded)]
    return [chunk for chunk in ranked.tolist() if chunk not in excluded][: max(0, k)]


def probe_version(versions: ArrayLike) -> float:
    """Return the version from which on chunks count as the probe; infinite if none was scored.

    They are the twentieth of the chunks ``versions`` (n_chunks,) that was scored last. While the gate is closed,
    round robin takes twenty times as long, so the probe moves over all chunks, and its own are as fresh
    as all would be if scorers scored without pause.
    """
    known = np.asarray(versions, np.float64)
    count = max(1, round(PROBE_SHARE * len(known)))
    known = known[~np.isnan(known)]
    if not len(known):
        return math.inf
    place = max(0, len(known) - count)
    return float(np.partition(known, place)[place])
