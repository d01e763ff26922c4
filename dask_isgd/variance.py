"""How much importance sampling helps: traces of the covariance of the gradient, and gains.

All traces are for one independent draw; divide by M for a minibatch of M independent draws. With
per-example gradient norms ||g_n||, their mean gradient μ and proposal weights s_n (Alain et al., 2015,
arXiv 1511.06481, section 4; notes in METHOD.md)::

    ideal    ((1/N) Σ ||g_n||)²                     - ||μ||²
    stale    ((1/N) Σ s_n) ((1/N) Σ ||g_n||² / s_n) - ||μ||²
    uniform  (1/N) Σ ||g_n||²                       - ||μ||²

ideal ≤ stale always; stale ≤ uniform is not guaranteed, which is why it is watched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

KEPT = 0.9
"""Share of the past each reporting step keeps."""


class SecondMoments(NamedTuple):
    """E ||c g||² of one draw: a trace plus ||μ||²."""

    ideal: float
    stale: float
    uniform: float


class Variance(NamedTuple):
    """Traces of the covariance of one independent draw's gradient, in squared units of the gradient."""

    ideal: float
    """Under the best proposal there is, proportional to the norms."""
    stale: float
    """Under the proposal in force."""
    uniform: float
    """Under uniform draws."""
    mean_square: float = 0.0
    """||μ||², the squared norm of the mean gradient: what was taken off all three."""

    @property
    def second_moments(self) -> SecondMoments:
        """The three with ||μ||² put back."""
        return SecondMoments(*(trace + self.mean_square for trace in self[:3]))

    @property
    def gain(self) -> float:
        """Uniform's second moment over the proposal's; 1 where every norm is zero."""
        moments = self.second_moments
        return _ratio(moments.uniform, moments.stale)

    @property
    def ideal_gain(self) -> float:
        """Uniform's second moment over the best proposal's."""
        moments = self.second_moments
        return _ratio(moments.uniform, moments.ideal)


def gradient_variance(norms: ArrayLike, proposal: ArrayLike, mean_gradient_norm: float) -> Variance:
    """The exact traces from all N examples.

    ``norms`` (N,) fresh gradient norms, ``proposal`` (N,) positive proposal weights of any scale,
    ``mean_gradient_norm`` ||μ||.

    >>> gradient_variance([3.0, 1.0], [1.0, 1.0], 0.0)
    Variance(ideal=4.0, stale=5.0, uniform=5.0, mean_square=0.0)
    """
    g, s = _floats("norms", norms), _floats("proposal", proposal)
    if g.shape != s.shape:
        raise ValueError(f"got {len(g)} norms and {len(s)} proposal weights, wanted one each an example")
    if not (s > 0).all():
        raise ValueError(f"got a smallest proposal weight of {s.min()}, wanted all positive; add smoothing")
    return _variance(SecondMoments(g.mean() ** 2, s.mean() * (g * g / s).mean(), (g * g).mean()), mean_gradient_norm**2)


def from_draws(norms: ArrayLike, coefficients: ArrayLike, mean_square: float) -> Variance:
    """The traces estimated from one weighted minibatch of M ≥ 2 examples, without another pass over the data.

    ``norms`` (M,) fresh norms of the examples drawn, ``coefficients`` (M,) c they were drawn with,
    ``mean_square`` an estimate of ||μ||². Each second moment is unbiased for independent draws: the
    stale one is the mean of (c||g||)², uniform's of c||g||², and the ideal one, the square of
    E c||g||, is taken from the products of different draws.
    """
    g, c = _minibatch(norms, coefficients)
    m = len(g)
    if m < 2:
        raise ValueError(f"got {m} draw, wanted at least 2; a single draw cannot tell ideal from stale")
    x = c * g
    ideal = (x.sum() ** 2 - (x * x).sum()) / (m * (m - 1))
    return _variance(SecondMoments(ideal, (x * x).mean(), (x * g).mean()), mean_square)


def from_chunk_sums(
    norms: ArrayLike,
    squares: ArrayLike,
    squares_over_proposal: ArrayLike,
    proposal: ArrayLike,
    count: ArrayLike,
    mean_square: float,
) -> Variance:
    """The traces from the sums a sampler's ``update`` returns, each (chunks,) or a number.

    A check, not the headline: every chunk is seen at its oldest, so staleness is overstated.
    """
    n = float(np.sum(count))
    if n < 1:
        raise ValueError(f"got sums over {n:.0f} examples, wanted at least one; wait for the first chunk")
    fresh, square, over, s = (float(np.sum(part)) / n for part in (norms, squares, squares_over_proposal, proposal))
    return _variance(SecondMoments(fresh**2, s * over, square), mean_square)


class VarianceMonitor:
    """Variance and gains smoothed over reporting steps, from the learner's own minibatches.

    Second moments and ||μ||² are averaged exponentially with the start's bias removed, and only then
    combined. The ideal second moment is the square of the smoothed mean of c||g||, so ideal ≤ stale holds.
    """

    _MEANS = ("first", "stale", "uniform", "mean_square")
    _CANDIDATE = ("candidate_uniform", "candidate_over", "candidate_mean", "candidate_share")

    def __init__(self, kept: float = KEPT) -> None:
        if not 0 <= kept < 1:
            raise ValueError(f"kept: got {kept}, wanted a share in [0, 1); 0 forgets everything before the last step")
        self.kept = kept
        self._means = dict.fromkeys(self._MEANS + self._CANDIDATE, 0.0)
        self._weight = self._candidate_weight = 0.0

    def observe(
        self,
        norms: ArrayLike,
        coefficients: ArrayLike,
        candidate: ArrayLike | None,
        mean_square: float,
    ) -> None:
        """Take in one minibatch.

        ``norms`` (M,) and ``coefficients`` (M,) of the draws, ``candidate`` (M,) proposal weights s of the
        same examples under the candidate proposal (of one scale in every call, such as
        N q; zero: the ``drop`` policy leaves the example out, and so does the candidate's gain) or None,
        ``mean_square`` an unbiased estimate of ||μ||², such as the dot product of the weighted
        mean gradients of two halves drawn independently; it may be negative. A minibatch with anything
        not finite is left out.
        """
        g, c = _minibatch(norms, coefficients)
        x = c * g
        means = dict(zip(self._MEANS, (x.mean(), (x * x).mean(), (x * g).mean(), mean_square), strict=True))
        extra = {} if candidate is None else self._candidate_means(g, c, _floats("candidate", candidate))
        if not all(map(math.isfinite, means.values())):
            return
        self._blend(means)
        self._weight = self.kept * self._weight + 1.0 - self.kept
        if extra:
            self._blend(extra)
            self._candidate_weight = self.kept * self._candidate_weight + 1.0 - self.kept

    def _candidate_means(
        self, g: NDArray[np.float64], c: NDArray[np.float64], s: NDArray[np.float64]
    ) -> dict[str, float]:
        if s.shape != g.shape or not (s >= 0).all():
            raise ValueError(f"candidate: got shape {s.shape}, least {s.min()}; wanted {g.shape}, none negative or NaN")
        drawn = s > 0
        if not drawn.any():
            return {}
        second = np.where(drawn, c * g * g, 0.0)
        over = second / np.where(drawn, s, 1.0)
        share = (c * drawn).mean() / c.mean()
        return dict(zip(self._CANDIDATE, (second.mean(), over.mean(), (c * s).mean(), share), strict=True))

    @property
    def variance(self) -> Variance:
        """The smoothed traces; NaN before the first minibatch."""
        if not self._weight:
            return Variance(math.nan, math.nan, math.nan, math.nan)
        first, stale, uniform, mean_square = (self._means[name] / self._weight for name in self._MEANS)
        return _variance(SecondMoments(first**2, stale, uniform), mean_square)

    @property
    def gain(self) -> float:
        """Uniform's second moment over that of what is being drawn; NaN before the first minibatch."""
        return self.variance.gain

    @property
    def candidate_gain(self) -> float:
        """Uniform's second moment over the candidate's, whatever is being drawn; NaN before the first candidate."""
        if not self._candidate_weight:
            return math.nan
        uniform, over, mean, share = (self._means[name] / self._candidate_weight for name in self._CANDIDATE)
        return _ratio(uniform * share, mean * over)

    def state(self) -> dict[str, float]:
        """Plain floats to go on from."""
        return {**self._means, "weight": self._weight, "candidate_weight": self._candidate_weight}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from ``state()``."""
        self._means = {name: float(state[name]) for name in self._means}
        self._weight, self._candidate_weight = float(state["weight"]), float(state["candidate_weight"])

    def _blend(self, means: Mapping[str, float]) -> None:
        for name, mean in means.items():
            self._means[name] = self.kept * self._means[name] + (1.0 - self.kept) * float(mean)


def _variance(moments: SecondMoments, mean_square: float) -> Variance:
    ideal, stale, uniform = (float(moment) - mean_square for moment in moments)
    return Variance(ideal, stale, uniform, float(mean_square))


def _ratio(above: float, below: float) -> float:
    return above / below if below else (1.0 if above == 0 else math.inf)


def _floats(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: got shape {array.shape}, wanted (N,) with N at least 1")
    return array


def _minibatch(norms: ArrayLike, coefficients: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    g, c = _floats("norms", norms), _floats("coefficients", coefficients)
    if g.shape != c.shape:
        raise ValueError(f"got {len(g)} norms and {len(c)} coefficients, wanted one each a draw")
    return g, c
