"""From stored weights to proposal weights: a pure function of each chunk's sums.

In chunk k the proposal weight of an example is affine in its stored weight w raised to ``power``::

    s = a_k u + b_k        u = w^power, or the mean of the scored u where w was never scored
    a_k = 2^(-age_k / fade)
    b_k = (1 - a_k) mean(u) + constant

so a chunk's sum follows from Σ u, and neither ages nor smoothing ever touch the examples. With
f = s - constant, the constant is the largest of

- ``smoothing`` × mean(f);
- mean(f)/(C - 1), which bounds every coefficient mean(s)/s by C = ``max_coefficient``;
- sqrt(E var(f)/(1 - E)) - mean(f), which makes (Σ s)²/(N Σ s²) at least E = ``effective_sample_size``;
- 1e-6 × mean(f): no example ever has probability zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dask_isgd.config import Sampling
from dask_isgd.sampling.draws import Floats, Integers

FLOOR = 1e-6
"""The least constant, in units of the mean: with no smoothing asked for, coefficients stay below a million."""
LEAST_USABLE = 0.1
"""Share of the examples below which the ``drop`` policy draws uniformly from all of them, as the paper does."""


@dataclass(frozen=True)
class Proposal:
    """The affine form of every chunk, and the sums that follow. K chunks; all float64."""

    scale: Floats
    """(K,) a."""
    shift: Floats
    """(K,) b."""
    fill: float
    """u of an example never scored."""
    usable: NDArray[np.bool_]
    """(K,) False where the ``drop`` policy leaves a chunk out."""
    count: int
    """Examples that can be drawn: N, unless some are dropped."""
    edges: Floats
    """(K,) cumulated Σ s, the dropped chunks adding nothing."""
    squares: float
    """Σ s²."""
    smallest: float
    """The smallest s that can be drawn."""
    blank: bool
    """Every scored weight is zero: uniform for want of anything better."""

    @cached_property
    def shares(self) -> Floats:
        """(K,) probability of picking each chunk: of the very edges that are searched."""
        return np.asarray(np.diff(self.edges, prepend=0.0) / self.edges[-1])

    @property
    def total(self) -> float:
        return float(self.edges[-1])

    def of(self, raised: Floats, chunks: Integers) -> Floats:
        """s (B, L) of rows of u (B, L) that lie in ``chunks`` (B,), whether dropped or not."""
        filled = np.where(np.isnan(raised), self.fill, raised)
        return np.asarray(self.scale[chunks, None] * filled + self.shift[chunks, None])


class Chunks(NamedTuple):
    """What the proposal needs to know of K chunks."""

    lengths: Integers
    """(K,) examples."""
    scored: Integers
    """(K,) examples with a weight."""
    moments: Floats
    """(2, K) Σ u and Σ u² over the scored."""
    lowest: Floats
    """(K,) the least u, infinite where nothing is scored."""
    age: Floats
    """(K,) steps, infinite where nothing is scored."""


def propose(sampling: Sampling, chunks: Chunks) -> Proposal:
    """The proposal in force for these chunks, in O(K)."""
    k = len(chunks.lengths)
    usable = np.ones(k, bool)
    if sampling.drop_after is not None:
        usable = chunks.age <= sampling.drop_after
        if chunks.lengths[usable].sum() < LEAST_USABLE * chunks.lengths.sum():
            return _sums(chunks, np.ones(k, bool), np.zeros(k), np.ones(k), 0.0)
    known = int(chunks.scored[usable].sum())
    fill = float(chunks.moments[0, usable].sum()) / known if known else 0.0
    if fill == 0.0:
        return _sums(chunks, usable, np.zeros(k), np.ones(k), 0.0, blank=known > 0)
    scale = np.ones(k)
    if sampling.fade is not None:
        scale = np.exp2(-np.where(np.isfinite(chunks.age), chunks.age, 0.0) / sampling.fade)
    faded = _sums(chunks, usable, scale, (1.0 - scale) * fill, fill)
    constant = _constant(sampling, faded.total / faded.count, faded.squares / faded.count)
    if math.isinf(constant):
        return _sums(chunks, usable, np.zeros(k), np.ones(k), 0.0)
    return _sums(chunks, usable, scale, faded.shift + constant, fill)


def _constant(sampling: Sampling, mean: float, mean_square: float) -> float:
    constants = [max(FLOOR, sampling.smoothing) * mean]
    if sampling.max_coefficient is not None:
        constants.append(mean / (sampling.max_coefficient - 1.0))
    wanted = sampling.effective_sample_size
    variance = max(0.0, mean_square - mean * mean)
    if wanted is not None and variance > 0.0:
        constants.append(math.sqrt(variance * wanted / (1.0 - wanted)) - mean if wanted < 1.0 else math.inf)
    return max(constants)


def _sums(
    chunks: Chunks,
    usable: NDArray[np.bool_],
    scale: Floats,
    shift: Floats,
    fill: float,
    *,
    blank: bool = False,
) -> Proposal:
    unscored = chunks.lengths - chunks.scored
    sums = chunks.moments[0] + unscored * fill
    squares = chunks.moments[1] + unscored * fill**2
    total = np.where(usable, scale * sums + chunks.lengths * shift, 0.0)
    total_squares = scale**2 * squares + 2.0 * scale * shift * sums + chunks.lengths * shift**2
    least = np.minimum(chunks.lowest, np.where(unscored > 0, fill, np.inf))
    return Proposal(
        scale=scale,
        shift=shift,
        fill=fill,
        usable=usable,
        count=int(chunks.lengths[usable].sum()),
        edges=np.cumsum(total),
        squares=float(total_squares[usable].sum()),
        smallest=float((scale * least + shift)[usable].min()),
        blank=blank,
    )
