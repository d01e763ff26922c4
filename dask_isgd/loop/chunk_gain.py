"""Draws by which a rewritten chunk shows the gain, if the loop reports no norms of its own.

The fresh norms of a chunk are compared with the weights that they replace. From each chunk as many examples are taken
as the proposal in force would draw there, so that all chunks in turn are a sample of its draws. The weights are as old
then as they become, so the gain is that of the oldest ones: rather too small than too large.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dask_isgd.sampling import Draw, ImportanceSampler

_PER_CHUNK = 256
"""Examples taken from a chunk that has an average share of the proposal."""


def draw_in_chunk(
    sampler: ImportanceSampler, chunk: int, norms: NDArray[np.float32], rng: np.random.Generator, *, uniform: bool
) -> tuple[Draw, NDArray[np.float64]] | None:
    """Return draws in a chunk, and their norms, before its fresh ``norms`` (chunk_len,) are put into the sampler.

    ``uniform``: whether draws are uniform now, and not by the proposal. None if there is nothing to draw: norms that
    are not finite are left out.
    """
    first, usable = chunk * sampler.chunk_size, np.isfinite(norms)
    weights = np.where(usable, 1.0 if uniform else sampler.weights(chunk), 0.0)
    edges = np.cumsum(weights)
    total = float(sampler.n) if uniform else sampler.total
    count = int(_PER_CHUNK * (sampler.n / sampler.chunk_size) * edges[-1] / total + rng.random())
    if not count or not edges[-1] > 0:
        return None
    rows = np.searchsorted(edges, rng.random(count) * edges[-1], side="right").clip(0, len(norms) - 1)
    q = weights[rows] / total
    return Draw(first + rows, 1.0 / (sampler.n * q), q), norms[rows].astype(np.float64)
