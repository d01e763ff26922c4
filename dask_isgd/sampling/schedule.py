"""Which chunks to score next."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike


def next_chunks(versions: ArrayLike, in_flight: Collection[int], k: int) -> list[int]:
    """Up to ``k`` chunks to score, the oldest version first.

    ``versions`` (n_chunks,) with NaN for never scored, which comes before all; chunks ``in_flight``
    are left out; ties go to the lower index.
    """
    age_order = np.asarray(versions, np.float64).copy()
    age_order[np.isnan(age_order)] = -np.inf
    waiting = set(in_flight)
    order = np.argsort(age_order, kind="stable")[: max(0, k) + len(waiting)]
    return [chunk for chunk in order.tolist() if chunk not in waiting][: max(0, k)]
