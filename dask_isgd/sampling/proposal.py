"""From stored weights to proposal weights: a pure function of each chunk's sums.

In chunk k the proposal weight of an example is affine in its stored weight w raised to ``exponent``::

    s = a_k u + b_k        u = w^exponent, or the mean of the scored u where w was never scored
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

FLOOR = 1e-6
"""The least constant, in units of the mean: with no smoothing asked for, coefficients stay below a million."""
LEAST_USABLE = 0.1
"""Share of the examples below which the ``drop`` policy draws uniformly from all of them, as the paper does."""


class Ageing:
    """What follows from the K chunks' lengths, scored examples and ages, and not from their weights."""

    def __init__(
        self, sampling: Sampling, lengths: Integers, scored: NDArray[Any], age: Floats, out: NDArray[np.bool_]
    ) -> None:
        k = len(lengths)
        self.usable: NDArray[np.bool_] = ~out
        """(K,) False for the chunks that are ``out``, and where the ``drop`` policy leaves one out."""
        self.blind = False
        """Too few examples are usable: draw uniformly from all."""
        if sampling.max_age_steps is not None:
            self.usable = ~out & (age <= sampling.max_age_steps)
            self.blind = bool(lengths[self.usable].sum() < LEAST_USABLE * lengths[~out].sum())
            if self.blind:
                self.usable = ~out
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
        self.towards: Floats = self.used_scale * self.unscored + (1.0 - self.scale) * self.lengths
        """(K,) a chunk's sum without the constant is used_scale Σ u + towards × mean(u)."""
        self.towards_total = float(self.towards.sum())


@dataclass(frozen=True, slots=True)
class Proposal:
    """The affine form of every chunk, and the edges that are searched. K chunks; all float64."""

    ageing: Ageing
    scale: Floats
    """(K,) a."""
    shift: Floats
    """(K,) b."""
    fill: float
    """u of an example never scored."""
    constant: float
    """What smoothing adds to every example in use."""
    edges: Floats
    """(K,) cumulated Σ s, the dropped chunks adding nothing."""
    plain: bool = False
    """Every a is one."""
    blank: bool = False
    """Every scored weight is zero: uniform for want of anything better."""

    @property
    def usable(self) -> NDArray[np.bool_]:
        return self.ageing.usable

    @property
    def count(self) -> int:
        return self.ageing.count

    @property
    def total(self) -> float:
        return float(self.edges[-1])

    def shares(self) -> Floats:
        """(K,) probability of picking each chunk: of the very edges that are searched."""
        return np.asarray(np.diff(self.edges, prepend=0.0) / self.edges[-1])

    def squares(self, sums: Floats, squares: Floats) -> float:
        """Σ s² from the chunks' Σ u and Σ u²."""
        return _squares(self.ageing, self.scale, self.shift, self.fill, sums, squares)

    def smallest(self, lowest: Floats) -> float:
        """The smallest s that can be drawn, from the chunks' least u."""
        least = np.minimum(lowest, np.where(self.ageing.unscored > 0, self.fill, np.inf))
        # No 0 × inf: where a is zero the weights do not matter, and may be none.
        scaled = np.where(self.scale > 0, self.scale * np.where(np.isfinite(least), least, 0.0), 0.0)
        return float((scaled + self.shift)[self.usable].min())


def propose(sampling: Sampling, ageing: Ageing, sums: Floats, squares: Callable[[], Floats]) -> Proposal:
    """The proposal in force for chunks with Σ u = ``sums`` (K,), in O(K).

    ``squares`` gives Σ u² (K,), and is asked for by an effective sample size only.
    """
    if ageing.blind:
        return flat(ageing, blank=False)
    used = sums * ageing.used_scale
    faded = sampling.half_life_steps is not None
    known = float((sums * ageing.in_use).sum()) if faded else float(used.sum())
    fill = known / ageing.known if ageing.known else 0.0
    if fill == 0.0:
        return flat(ageing, blank=ageing.known > 0)
    mean = ((float(used.sum()) if faded else known) + fill * ageing.towards_total) / ageing.count
    constant = max(FLOOR, sampling.smoothing) * mean
    if sampling.max_coefficient is not None:
        constant = max(constant, mean / (sampling.max_coefficient - 1.0))
    shift = (1.0 - ageing.scale) * fill
    wanted = sampling.ess_fraction
    if wanted is not None:
        total = _squares(ageing, ageing.scale, shift, fill, sums, squares())
        variance = max(0.0, total / ageing.count - mean * mean)
        if variance > 0.0 and wanted == 1.0:
            return flat(ageing, blank=False)
        if variance > 0.0:
            constant = max(constant, math.sqrt(variance * wanted / (1.0 - wanted)) - mean)
    shift += constant
    if ageing.towards_total:
        used += fill * ageing.towards
    used += constant * ageing.lengths
    return Proposal(ageing, ageing.scale, shift, fill, constant, np.cumsum(used), plain=not faded)


def flat(ageing: Ageing, *, blank: bool) -> Proposal:
    """Every example that can be drawn has weight one."""
    k = len(ageing.lengths)
    return Proposal(ageing, np.zeros(k), np.ones(k), 0.0, 1.0, np.cumsum(ageing.lengths), blank=blank)


def _squares(ageing: Ageing, scale: Floats, shift: Floats, fill: float, sums: Floats, squares: Floats) -> float:
    first = sums + ageing.unscored * fill
    second = squares + ageing.unscored * fill**2
    s = scale**2 * second + 2.0 * scale * shift * first + ageing.lengths * shift**2
    return float(s[ageing.usable].sum())
