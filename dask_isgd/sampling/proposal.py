"""From stored weights to proposal weights: a pure function of each chunk's sums.

In chunk k the proposal weight of an example is affine in its stored weight w raised to ``exponent``::

    s = a_k u + b_k        u = w^exponent, or the mean of the scored u if w was never scored
    a_k = 2^(-age_k / half_life_steps)
    b_k = (1 - a_k) mean(u) + constant

so a chunk's sum follows from Σ u, and neither ages nor smoothing ever touch the examples. With
f = s - constant, the constant is the largest of

- ``smoothing`` × mean(f);
- mean(f)/(C - 1), which bounds every coefficient mean(s)/s by C = ``max_coefficient``;
- sqrt(E var(f)/(1 - E)) - mean(f), which makes (Σ s)²/(N Σ s²) at least E = ``ess_fraction``;
- 1e-6 × mean(f): no example ever has probability zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.config import Sampling
from dask_isgd.sampling.draws import Floats, Integers

MIN_CONSTANT = 1e-6
"""The smallest constant, in units of the mean: even without smoothing, coefficients stay below a million."""
MIN_USABLE = 0.1
"""Share of the examples below which the ``drop`` policy draws uniformly from all of them, as the paper does."""


class ChunkStates:
    """What follows from the lengths, scored examples and ages of the K chunks, and not from their weights."""

    def __init__(
        self, sampling: Sampling, lengths: Integers, scored: NDArray[Any], age: Floats, left_out: NDArray[np.bool_]
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
            self.scale = np.exp2(np.where(np.isfinite(age), age, 0.0) / -sampling.half_life_steps).astype(np.float64)
        self.in_use: Floats = self.usable.astype(np.float64)
        self.lengths: Floats = lengths * self.in_use
        """(K,) examples in use."""
        self.scored: Floats = scored * self.in_use
        self.unscored: Floats = self.lengths - self.scored
        self.count = int(self.lengths.sum())
        """Examples that can be drawn: N, unless some are dropped."""
        self.known = int(self.scored.sum())
        self.used_scale: Floats = self.scale * self.in_use
        self.prior_counts: Floats = self.used_scale * self.unscored + (1.0 - self.scale) * self.lengths
        """(K,) a chunk's sum without the constant is used_scale Σ u + prior_counts × mean(u)."""
        self.prior_total = float(self.prior_counts.sum())


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

    def squares(self, sums: Floats, squares: Floats) -> float:
        """Return Σ s² from the chunks' Σ u and Σ u², each (K,)."""
        return _squares(self.chunks, self.scale, self.shift, self.prior, sums, squares)

    def smallest(self, lowest: Floats) -> float:
        """Return the smallest s that can be drawn, from the chunks' smallest u (K,)."""
        smallest = np.minimum(lowest, np.where(self.chunks.unscored > 0, self.prior, np.inf))
        # No 0 × inf: if a is zero the weights do not matter, and there may be none.
        scaled = np.where(self.scale > 0, self.scale * np.where(np.isfinite(smallest), smallest, 0.0), 0.0)
        return float((scaled + self.shift)[self.usable].min())


def propose(sampling: Sampling, chunks: ChunkStates, sums: Floats, squares: Callable[[], Floats]) -> Proposal:
    """Return the proposal for chunks with Σ u = ``sums`` (K,), in O(K).

    ``squares`` returns Σ u² (K,); it is called only if an effective sample size is configured.
    """
    if chunks.too_few:
        return flat(chunks, all_zero=False)
    used = sums * chunks.used_scale
    faded = sampling.half_life_steps is not None
    known = float((sums * chunks.in_use).sum()) if faded else float(used.sum())
    prior = known / chunks.known if chunks.known else 0.0
    if prior == 0.0:
        return flat(chunks, all_zero=chunks.known > 0)
    mean = ((float(used.sum()) if faded else known) + prior * chunks.prior_total) / chunks.count
    constant = max(MIN_CONSTANT, sampling.smoothing) * mean
    if sampling.max_coefficient is not None:
        constant = max(constant, mean / (sampling.max_coefficient - 1.0))
    shift = (1.0 - chunks.scale) * prior
    wanted = sampling.ess_fraction
    if wanted is not None:
        total = _squares(chunks, chunks.scale, shift, prior, sums, squares())
        variance = max(0.0, total / chunks.count - mean * mean)
        if variance > 0.0 and wanted == 1.0:
            return flat(chunks, all_zero=False)
        if variance > 0.0:
            constant = max(constant, math.sqrt(variance * wanted / (1.0 - wanted)) - mean)
    shift += constant
    if chunks.prior_total:
        used += prior * chunks.prior_counts
    used += constant * chunks.lengths
    return Proposal(chunks, chunks.scale, shift, prior, constant, np.cumsum(used), unscaled=not faded)


def flat(chunks: ChunkStates, *, all_zero: bool) -> Proposal:
    """Return the proposal in which every example that can be drawn has weight one."""
    k = len(chunks.lengths)
    return Proposal(chunks, np.zeros(k), np.ones(k), 0.0, 1.0, np.cumsum(chunks.lengths), all_zero=all_zero)


def _squares(chunks: ChunkStates, scale: Floats, shift: Floats, prior: float, sums: Floats, squares: Floats) -> float:
    first = sums + chunks.unscored * prior
    second = squares + chunks.unscored * prior**2
    s = scale**2 * second + 2.0 * scale * shift * first + chunks.lengths * shift**2
    return float(s[chunks.usable].sum())
