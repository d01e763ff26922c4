"""Chooses a step's examples from several minibatches, by bounds of their gradients at the current parameters.

Weights are as old as the last look at an example; a forward pass of ``Sampling.presample`` minibatches is of now. Which
examples of it are trained on is drawn in proportion to a bound (Katharopoulos and Fleuret, arXiv 1803.00942). The
gradient stays unbiased: given the pool, its expectation is the pool's own weighted mean, and that has the right one.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from dask_isgd.core.loss import Loss
from dask_isgd.learner.feed.prefetch import Minibatch
from dask_isgd.norms import NormEngine
from dask_isgd.sampling import Draw
from dask_isgd.sampling.draws import Floats, Integers, positions

_SMOOTHING = 0.3
"""Constant added to every bound, in units of their mean."""


def shares(coefficients: Floats, bounds: Floats, most: float) -> Floats:
    """Return with which probabilities r (P,) examples of a pool are to be chosen, in proportion to c × (bound + added).

    ``coefficients`` c (P,) are those of the pool, ``bounds`` (P,) at least 0; what is not finite counts as the mean. A
    chosen example's coefficient is c / (P r). What is added keeps all of these at ``most`` or below, unless the
    pool's own mean coefficient is larger.

    >>> shares(np.ones(2), np.array([3.0, 1.0]), 2.0).round(3)
    array([0.692, 0.308])
    """
    known = np.isfinite(bounds)
    mean = float(bounds[known].mean()) if known.any() else 0.0
    b = np.where(known, bounds, mean)
    own = float(coefficients.mean())
    added = _SMOOTHING * mean
    if own < most < math.inf:
        added = max(added, (float((coefficients * b).mean()) - most * float(b.min())) / (most - own))
    wanted = coefficients * (b + added) if own < most else coefficients
    total = float(wanted.sum())
    return wanted / total if total > 0 else np.full(len(b), 1.0 / len(b))


def choose(pool: Draw, bounds: Floats, size: int, most: float, rng: np.random.Generator) -> tuple[Integers, Draw]:
    """Draw ``size`` examples from a pool: return their places in it (size,), and the minibatch."""
    r = shares(pool.coefficients, bounds, most)
    edges = r.cumsum()
    at = np.searchsorted(edges / edges[-1], positions("stratified", size, rng), side="right")
    coefficients = pool.coefficients[at] / (len(r) * r[at])
    return at, Draw(pool.indices[at], coefficients, pool.probabilities[at])


class Presampler:
    """Makes minibatches of ``size`` examples from pools of several times as many; ``most`` bounds coefficients."""

    def __init__(self, model: torch.nn.Module, loss: Loss, *, size: int, most: float, seed: int) -> None:
        self._engine = NormEngine(model, loss, method="bound")
        self._size, self._most, self._seed = size, most, seed

    def first(self, pool: Minibatch) -> Minibatch:
        """Return the first examples of a pool, which are drawn as a minibatch alone would be."""
        return _rows(pool, slice(self._size), pool.draw.split(self._size)[0])

    def choose(self, pool: Minibatch) -> Minibatch:
        """Return examples chosen by their bounds; which ones depends on the seed, the step, parameters and pool."""
        bounds, _ = self._engine(pool.inputs, pool.targets)
        generator = np.random.Generator(
            np.random.Philox(key=self._seed, counter=np.array([0, 1, 0, pool.step], np.uint64))
        )
        at, draw = choose(pool.draw, bounds.double().cpu().numpy(), self._size, self._most, generator)
        return _rows(pool, torch.from_numpy(at).to(pool.targets.device), draw)


def _rows(pool: Minibatch, rows: slice | torch.Tensor, draw: Draw) -> Minibatch:
    return Minibatch(pool.step, draw, tuple(x[rows] for x in pool.inputs), pool.targets[rows])
