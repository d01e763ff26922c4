"""From stored weights to proposal weights: a pure function of each chunk's sums.

In chunk k the proposal weight of an example is affine in its stored weight w raised to ``exponent``::

    s = a_k r u + (1 - a_k r) mean(u) + constant       u = w^exponent
      = a_k (r u + (1 - r) mean(u)) + b_k              b_k = (1 - a_k) mean(u) + constant
    a_k = 2^(-(step - base_k) / half_life_steps)

Here r is 1 or, with fading, the freshness of the example compared to its chunk (``example_ages``); r is 0 if w was
never scored. The mean is over the scored examples. A chunk's sum follows from Σ r u and Σ r, and neither time nor
smoothing ever touches the examples. With f = s - constant, the constant is the largest of

- ``smoothing`` × mean(f);
- mean(f)/(C - 1), which bounds every coefficient mean(s)/s by C = ``max_coefficient``;
- sqrt(E var(f)/(1 - E)) - mean(f), which makes (Σ s)²/(N Σ s²) at least E = ``ess_fraction``;
- 1e-6 × mean(f): no example ever has probability zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.config import SMOOTHING, Sampling
from dask_isgd.sampling.draws import Floats, Integers
from dask_isgd.sampling.weight_blocks import WeightBlocks

MIN_CONSTANT = 1e-6
"""The smallest constant, in units of the mean: even without smoothing, coefficients stay below a million."""
MIN_USABLE = 0.1
"""Share of the examples below which the ``drop`` policy draws uniformly from all of them, as the paper does."""


class ChunkStates:
    """What follows from the lengths, scored examples and ages of the K chunks, and not from their weights.

    ``age`` (K,) is that of the scores, for the ``drop`` policy; ``base_age`` (K,) that of the base, for fading.
    """

    def __init__(
        self,
        sampling: Sampling,
        lengths: Integers,
        scored: NDArray[Any],
        age: Floats,
        base_age: Floats,
        left_out: NDArray[np.bool_],
    ) -> None:
        k = len(lengths)
        self.usable: NDArray[np.bool_] = ~left_out
        """(K,) False for the chunks ``left_out``, and for those that the ``drop`` policy leaves out."""
        self.too_few = False
        """Too few examples are usable: draw uniformly from all."""
        if sampling.max_age_steps is not None:
            self.usable = ~left_out & (age <= sampling.max_age_steps)
            self.too_few = bool(lengths[self.usable].sum() < MIN_USABLE * lengths[~left_out].sum())
            if self.too_few:
                self.usable = ~left_out
        self.scale: Floats = np.ones(k)
        """(K,) a."""
        if sampling.half_life_steps is not None:
            self.scale = np.exp2(np.maximum(base_age, 0.0) / -sampling.half_life_steps)
            self.scale[np.isnan(base_age)] = 1.0
        self.in_use: Floats = self.usable.astype(np.float64)
        self.lengths: Floats = lengths * self.in_use
        """(K,) examples in use."""
        self.scored: Floats = scored * self.in_use
        self.unscored: Floats = self.lengths - self.scored
        self.count = int(self.lengths.sum())
        """Examples that can be drawn: N, unless some are dropped."""
        self.known = int(self.scored.sum())
        self.used_scale: Floats = self.scale * self.in_use


@dataclass(frozen=True, slots=True)
class Proposal:
    """The affine form of every chunk, and the edges that are searched. K chunks; all float64."""

    chunks: ChunkStates
    scale: Floats
    """(K,) a."""
    shift: Floats
    """(K,) b."""
    prior: float
    """u of an example never scored."""
    constant: float
    """What smoothing adds to every example in use."""
    edges: Floats
    """(K,) cumulative Σ s; dropped chunks add nothing."""
    unscaled: bool = False
    """Every a is one."""
    all_zero: bool = False
    """Every scored weight is zero: uniform because nothing better is known."""

    @property
    def usable(self) -> NDArray[np.bool_]:
        return self.chunks.usable

    @property
    def count(self) -> int:
        return self.chunks.count

    @property
    def total(self) -> float:
        return float(self.edges[-1])

    def shares(self) -> Floats:
        """Return (K,) the probabilities of the chunks, from the same edges that draws search."""
        return np.asarray(np.diff(self.edges, prepend=0.0) / self.edges[-1])

    def squares(self, weights: WeightBlocks) -> float:
        """Return Σ s²."""
        return _squares(self.chunks, self.shift + self.scale * self.prior, self.scale, self.prior, weights)

    def smallest(self, lowest: Floats, newest: Floats) -> float:
        """Return the smallest s that can be drawn, from the chunks' smallest u and largest r, each (K,).

        With fading it may be less than that: the lightest example of a chunk is taken to be its newest.
        """
        below = np.minimum(lowest, self.prior) - self.prior
        return float((self.scale * newest * below + self.shift + self.scale * self.prior)[self.usable].min())


def propose(sampling: Sampling, chunks: ChunkStates, weights: WeightBlocks) -> Proposal:
    """Return the proposal for the current weights, in O(K)."""
    if chunks.too_few:
        return flat(chunks, all_zero=False)
    known = float((weights.sums.chunks * chunks.in_use).sum())
    prior = known / chunks.known if chunks.known else 0.0
    if prior == 0.0:
        return flat(chunks, all_zero=chunks.known > 0)
    used = weights.fresh_sums.chunks * chunks.used_scale
    prior_counts, prior_total = chunks.unscored, float(chunks.count - chunks.known)
    if weights.faded:
        prior_counts = chunks.lengths - chunks.used_scale * weights.fresh.chunks
        prior_total = float(prior_counts.sum())
    mean = (float(used.sum()) + prior * prior_total) / chunks.count
    constant = max(MIN_CONSTANT, SMOOTHING if sampling.smoothing is None else sampling.smoothing) * mean
    if sampling.max_coefficient is not None:
        constant = max(constant, mean / (sampling.max_coefficient - 1.0))
    wanted = sampling.ess_fraction
    if wanted is not None:
        total = _squares(chunks, np.full(len(used), prior), chunks.scale, prior, weights)
        variance = max(0.0, total / chunks.count - mean * mean)
        if variance > 0.0 and wanted == 1.0:
            return flat(chunks, all_zero=False)
        if variance > 0.0:
            constant = max(constant, math.sqrt(variance * wanted / (1.0 - wanted)) - mean)
    shift = (1.0 - chunks.scale) * prior + constant
    if prior_total:
        used += prior * prior_counts
    used += constant * chunks.lengths
    return Proposal(chunks, chunks.scale, shift, prior, constant, np.cumsum(used), unscaled=not weights.faded)


def flat(chunks: ChunkStates, *, all_zero: bool) -> Proposal:
    """Return the proposal in which every example that can be drawn has weight one."""
    k = len(chunks.lengths)
    return Proposal(chunks, np.zeros(k), np.ones(k), 0.0, 1.0, np.cumsum(chunks.lengths), all_zero=all_zero)


def _squares(chunks: ChunkStates, rest: Floats, scale: Floats, prior: float, weights: WeightBlocks) -> float:
    """Return Σ (a r (u - mean(u)) + rest)² over all examples in use, with ``rest`` (K,)."""
    r2, r2u, r2u2 = weights.fresh_squares()
    spread = r2u2 - 2.0 * prior * r2u + prior * prior * r2
    excess = weights.fresh_sums.chunks - prior * weights.fresh.chunks
    s = scale**2 * spread + 2.0 * scale * rest * excess + chunks.lengths * rest**2
    return float(s[chunks.usable].sum())
