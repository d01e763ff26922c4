"""A sampler with one explicit weight per example and no sums: the real one must agree with it."""

from __future__ import annotations

import math

import numpy as np

from dask_isgd.config import Sampling


class Oracle:
    def __init__(self, n: int, chunk_size: int, sampling: Sampling) -> None:
        self.n, self.chunk_size, self.sampling = n, chunk_size, sampling
        self.w = np.full(n, np.nan, np.float32)
        self.chunk_of = np.arange(n) // chunk_size
        self.versions = np.full(self.chunk_of[-1] + 1, np.nan)
        self.seen = np.full(n, np.nan)  # step of the feedback an example holds
        self.step = 0

    def update(self, chunk, weights, version):
        own = self.chunk_of == chunk
        marked = own & ~np.isnan(self.seen)
        keep = marked if marked.any() and self.seen[marked].min() > version else np.zeros(self.n, bool)
        fresh = np.empty(self.n, np.float32)
        fresh[own] = weights
        self._replace(np.flatnonzero(own & ~keep), fresh)
        self.seen[own & ~keep] = np.nan
        self.versions[chunk] = version

    def _replace(self, indices, fresh):
        m = self.sampling.ema_decay
        for i in indices:
            old, new = float(self.w[i]), float(fresh[i])
            self.w[i] = new if math.isnan(old) or not m else math.sqrt(m * old**2 + (1 - m) * new**2)

    def feedback(self, indices, norms, step):
        for i, norm in zip(indices, norms, strict=True):
            self._replace([i], np.full(self.n, norm, np.float32))
            # A chunk keeps only the oldest of all marks since it was replaced.
            self.seen[i] = np.fmin(self.seen[i], step)

    def proposal(self):
        """(s, usable), each (n,)."""
        sampling, n = self.sampling, self.n
        age = np.maximum(0.0, self.step - self.versions)[self.chunk_of]
        usable = np.ones(n, bool)
        if sampling.max_age_steps is not None:
            usable = age <= sampling.max_age_steps  # NaN compares false
            if usable.sum() < 0.1 * n:
                return np.ones(n), np.ones(n, bool)
        u = self.w.astype(np.float64) ** sampling.exponent
        scored = usable & ~np.isnan(u)
        prior = u[scored].mean() if scored.any() else 0.0
        if prior == 0.0:
            return usable * 1.0, usable
        f = np.where(np.isnan(u), prior, u)
        if sampling.half_life_steps is not None:
            kept = np.where(np.isnan(age), 1.0, 2.0 ** (-age / sampling.half_life_steps))
            f = kept * f + (1.0 - kept) * prior
        mean, variance = f[usable].mean(), f[usable].var()
        constants = [sampling.smoothing * mean, 1e-6 * mean]
        if sampling.max_coefficient is not None:
            constants.append(mean / (sampling.max_coefficient - 1.0))
        ess = sampling.ess_fraction
        if ess is not None:
            constants.append(math.sqrt(ess * variance / (1.0 - ess)) - mean)
        return (f + max(constants)) * usable, usable
