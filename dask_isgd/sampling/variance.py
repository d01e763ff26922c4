"""How much importance sampling helps: traces of the covariance of the gradient, and gains.

All traces are for one independent draw; divide by M for a minibatch of M independent draws. With
per-example gradient norms ||g_n||, their mean gradient μ and proposal weights s_n (Alain et al., 2015,
arXiv 1511.06481, section 4; notes in METHOD.md)::

    ideal    ((1/N) Σ ||g_n||)²                     - ||μ||²
    stale    ((1/N) Σ s_n) ((1/N) Σ ||g_n||² / s_n) - ||μ||²
    uniform  (1/N) Σ ||g_n||²                       - ||μ||²

ideal ≤ stale always; stale ≤ uniform is not guaranteed, which is why it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dask_isgd.sampling.ewma import EWMA

DECAY = 0.9
"""Share of the averages that each reporting step leaves in place."""


class SecondMoments(NamedTuple):
    """E ||c g||² of one draw: a trace plus ||μ||²."""

    ideal: float
    stale: float
    uniform: float


class Variance(NamedTuple):
    """Traces of the covariance of one independent draw's gradient, in squared units of the gradient."""

    ideal: float
    """Under the best possible proposal, proportional to the norms."""
    stale: float
    """Under the proposal in force."""
    uniform: float
    """Under uniform draws."""
    mean_gradient_sq_norm: float = 0.0
    """||μ||², the squared norm of the mean gradient: already subtracted from all three."""

    @property
    def second_moments(self) -> SecondMoments:
        """The three second moments: the traces with ||μ||² added back."""
        return SecondMoments(*(trace + self.mean_gradient_sq_norm for trace in self[:3]))

    @property
    def noise_scale(self) -> float:
        """Uniform's trace over ||μ||²: minibatches of so many uniform draws have as much noise as mean gradient.

        NaN if ||μ||² cannot be told from zero.
        """
        return self.uniform / self.mean_gradient_sq_norm if self.mean_gradient_sq_norm > 0 else math.nan

    @property
    def gain(self) -> float:
        """Uniform's second moment over the proposal's; 1 if every norm is zero."""
        moments = self.second_moments
        return _ratio(moments.uniform, moments.stale)

    @property
    def ideal_gain(self) -> float:
        """Uniform's second moment over the best possible proposal's."""
        moments = self.second_moments
        return _ratio(moments.uniform, moments.ideal)

    def rate_gain(self, batch: int) -> float:
        """Return the factor, from 1 to the gain, by which minibatches of ``batch`` draws allow a higher learning rate.

        The ratio of the expected squared norms of the two minibatches' gradients, AdaScale's form (Johnson et al.,
        arXiv 2007.05105) with uniform draws in the place of small minibatches: that of the noise where noise dominates,
        near 1 where the mean gradient does. 1 if unknown.
        """
        if not all(map(math.isfinite, self)):
            return 1.0
        square = max(0.0, self.mean_gradient_sq_norm)
        uniform, stale = (max(0.0, trace) / batch + square for trace in (self.uniform, self.stale))
        return max(1.0, uniform / stale) if stale > 0 else 1.0


def square_of_mean(gradient_norm: float, coefficients: ArrayLike, norms: ArrayLike) -> float:
    """Return an unbiased estimate of ||μ||² from one minibatch of M independent draws; NaN for fewer than two.

    ``gradient_norm`` is ||(1/M) Σ c g||, ``coefficients`` and ``norms`` (M,) are c and ||g|| of the draws. The
    square of the sum contains every product of two different draws, whose expectation is ||μ||², and
    the squares of the draws themselves, which are subtracted::

        (||Σ c g||² - Σ c² ||g||²) / (M (M - 1))

    It uses all pairs, while the dot product of two halves uses only half of them, and costs one
    norm. It may be negative.
    """
    x = _floats("coefficients", coefficients) * _floats("norms", norms)
    size = len(x)
    if size < 2:
        return math.nan
    return float(((size * gradient_norm) ** 2 - x @ x) / (size * (size - 1)))


def gradient_variance(norms: ArrayLike, proposal: ArrayLike, mean_gradient_norm: float) -> Variance:
    """Return the exact traces from all N examples.

    ``norms`` (N,) fresh gradient norms, ``proposal`` (N,) positive proposal weights of any scale,
    ``mean_gradient_norm`` ||μ||.

    >>> gradient_variance([3.0, 1.0], [1.0, 1.0], 0.0)
    Variance(ideal=4.0, stale=5.0, uniform=5.0, mean_gradient_sq_norm=0.0)
    """
    g, s = _floats("norms", norms), _floats("proposal", proposal)
    if g.shape != s.shape:
        raise ValueError(f"got {len(g)} norms and {len(s)} proposal weights, wanted one of each per example")
    if not (s > 0).all():
        raise ValueError(f"got a smallest proposal weight of {s.min()}, wanted only positive ones; add smoothing")
    return _variance(SecondMoments(g.mean() ** 2, s.mean() * (g * g / s).mean(), (g * g).mean()), mean_gradient_norm**2)


class ErrorBars(NamedTuple):
    """Half-widths of 95 % intervals around the monitor's values; NaN before the second minibatch."""

    ideal: float
    stale: float
    uniform: float
    gain: float
    candidate_gain: float


class GainFactors(NamedTuple):
    """What separates the gain in force from the ideal one: gain = ideal gain / (smoothing × staleness)."""

    smoothing: float
    """Second moment of an equally smoothed proposal from fresh norms, over the ideal one; at least 1."""
    staleness: float
    """Second moment of the proposal in force, over that of the equally smoothed one from fresh norms."""


class VarianceMonitor:
    """Estimates variance and gains from the learner's own minibatches, smoothed over reporting steps.

    Second moments and ||μ||² are averaged exponentially with the start's bias removed, and only then
    combined. The ideal second moment is the square of the smoothed mean of c||g||, so ideal ≤ stale holds.

    Error bars follow from the scatter of the averaged means from one minibatch to the next, to first
    order (the delta method): they cannot reflect what no minibatch has shown.
    """

    def __init__(self, decay: float = DECAY) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, wanted a share in [0, 1); with 0 only the last step counts")
        self.decay = decay
        self.latest_candidate_gain = math.nan
        """The candidate's gain in the latest minibatch alone."""
        self.restart()

    def restart(self) -> None:
        """Forget all minibatches, because those that follow are drawn from another distribution."""
        decay = self.decay
        self._drawn = EWMA(("first", "stale", "uniform", "mean_gradient_sq_norm", "defended"), decay)
        self._candidate = EWMA(("uniform", "over", "mean", "share"), decay)

    def observe(
        self,
        norms: ArrayLike,
        coefficients: ArrayLike,
        candidate: ArrayLike | None,
        mean_gradient_sq_norm: float,
        *,
        uniform_share: float = 1.0,
    ) -> None:
        """Add one minibatch.

        ``norms`` (M,) and ``coefficients`` (M,) of the draws, ``candidate`` (M,) proposal weights s of the
        same examples under the candidate proposal (with the same scale in every call, such as
        N q; zero: the ``drop`` policy leaves the example out, and so does the candidate's gain) or None,
        ``mean_gradient_sq_norm`` an unbiased estimate of ||μ||² (``square_of_mean``), which may be negative,
        ``uniform_share`` the share of the proposal in force that smoothing spreads evenly (1: uniform
        draws), for ``factors``. A minibatch with a value that is not finite is ignored.
        """
        g, c = _minibatch(norms, coefficients)
        if not (np.isfinite(g).all() and np.isfinite(c).all()):
            return
        x = c * g
        first = x.mean()
        level = self._drawn["first"] if self._drawn else first
        relative = g / level if level > 0 else np.ones_like(g)
        # An equally smoothed proposal from fresh norms is (1 - λ) g / mean(g) + λ.
        fresh = np.maximum((1.0 - uniform_share) * relative + uniform_share, np.finfo(np.float64).tiny)
        defended = np.where(g > 0, x * g / fresh, 0.0).mean()
        known = self._drawn.add((first, (x * x).mean(), (x * g).mean(), mean_gradient_sq_norm, defended))
        if known and candidate is not None:
            self.observe_candidate(g, c, candidate)

    def observe_candidate(self, norms: ArrayLike, coefficients: ArrayLike, candidate: ArrayLike) -> None:
        """Add draws for the candidate's gain alone; they may differ from those given to ``observe``."""
        (g, c), s = _minibatch(norms, coefficients), _floats("candidate", candidate)
        if s.shape != g.shape or not (s >= 0).all():
            raise ValueError(
                f"candidate: got shape {s.shape}, minimum {s.min()}; wanted {g.shape}, none negative or NaN"
            )
        drawn = s > 0
        if not drawn.any() or not np.isfinite(g).all():
            return
        second = np.where(drawn, c * g * g, 0.0)
        over = second / np.where(drawn, s, 1.0)
        uniform, stale, mean, share = second.mean(), over.mean(), (c * s).mean(), (c * drawn).mean() / c.mean()
        if self._candidate.add((uniform, stale, mean, share)):
            self.latest_candidate_gain = _ratio(uniform * share, mean * stale)

    @property
    def variance(self) -> Variance:
        """The smoothed traces; NaN before the first minibatch."""
        if not self._drawn:
            return Variance(math.nan, math.nan, math.nan, math.nan)
        d = self._drawn
        return _variance(SecondMoments(d["first"] ** 2, d["stale"], d["uniform"]), d["mean_gradient_sq_norm"])

    @property
    def gain(self) -> float:
        """Uniform's second moment over that of the actual draws; NaN before the first minibatch."""
        return self.variance.gain

    @property
    def candidate_gain(self) -> float:
        """Uniform's second moment over the candidate's, whatever the draws are; NaN before the first candidate."""
        if not self._candidate:
            return math.nan
        c = self._candidate
        return _ratio(c["uniform"] * c["share"], c["mean"] * c["over"])

    @property
    def factors(self) -> GainFactors:
        """By how much smoothing and staleness reduce the gain; NaN before the first minibatch."""
        if not self._drawn:
            return GainFactors(math.nan, math.nan)
        d = self._drawn
        return GainFactors(_ratio(d["defended"], d["first"] ** 2), _ratio(d["stale"], d["defended"]))

    @property
    def errors(self) -> ErrorBars:
        """95 % error bars of the three traces and the two gains."""
        d, c = self._drawn, self._candidate
        if not d:
            return ErrorBars(math.nan, math.nan, math.nan, math.nan, math.nan)
        gain = {"uniform": _quotient(1.0, d["stale"]), "stale": -_quotient(d["uniform"], d["stale"] ** 2)}
        return ErrorBars(
            d.half_width({"first": 2.0 * d["first"], "mean_gradient_sq_norm": -1.0}),
            d.half_width({"stale": 1.0, "mean_gradient_sq_norm": -1.0}),
            d.half_width({"uniform": 1.0, "mean_gradient_sq_norm": -1.0}),
            d.half_width(gain),
            self._candidate_error() if c else math.nan,
        )

    def _candidate_error(self) -> float:
        c, gain = self._candidate, self.candidate_gain
        signs = {"uniform": 1.0, "share": 1.0, "mean": -1.0, "over": -1.0}
        return c.half_width({name: sign * _quotient(gain, c[name]) for name, sign in signs.items()})

    def state(self) -> dict[str, list[float]]:
        """Return plain floats, for :meth:`restore`."""
        return {"drawn": self._drawn.state(), "candidate": self._candidate.state()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from ``state()``."""
        self._drawn.restore(state["drawn"])
        self._candidate.restore(state["candidate"])


def _variance(moments: SecondMoments, mean_gradient_sq_norm: float) -> Variance:
    ideal, stale, uniform = (float(moment) - mean_gradient_sq_norm for moment in moments)
    return Variance(ideal, stale, uniform, float(mean_gradient_sq_norm))


def _quotient(above: float, below: float) -> float:
    return above / below if below else 0.0


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
        raise ValueError(f"got {len(g)} norms and {len(c)} coefficients, wanted one of each per draw")
    return g, c
