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
        self.step = 0
        self.half_life = sampling.half_life_steps
        self.unit = 8.0 if self.half_life is None else self.half_life / 8
        self.base = np.full(len(self.versions), np.nan)  # step of code 0
        self.code = np.zeros(n)  # units after the base

    def update(self, chunk, weights, version):
        own = np.flatnonzero(self.chunk_of == chunk)
        dated = self.base[chunk] + self.code[own] * self.unit
        keep = (self.code[own] > 0) & (dated >= version - 1e-6)
        fresh = np.empty(self.n, np.float32)
        fresh[own] = weights
        self._replace(own[~keep], fresh, self._elapsed(own, version)[~keep])
        self.versions[chunk] = self.base[chunk] = version
        self.code[own] = [
            math.floor((d - version) / self.unit + 1e-6) if k else 0 for d, k in zip(dated, keep, strict=True)
        ]
        if self.code[own].max() > 255:
            self._move(chunk, self.code[own].max() - 128)

    def _move(self, chunk, units):
        own = self.chunk_of == chunk
        self.base[chunk] += units * self.unit
        self.code[own] = np.maximum(self.code[own] - units, 0)

    def _elapsed(self, indices, step):
        return np.maximum(0.0, step - self.base[self.chunk_of[indices]] - self.code[indices] * self.unit)

    def _replace(self, indices, fresh, elapsed):
        tau = self.sampling.ema_steps
        for i, age in zip(indices, elapsed, strict=True):
            m = self.sampling.ema_decay if tau is None else min(self.sampling.ema_decay, math.exp(-age / tau))
            old, new = float(self.w[i]), float(fresh[i])
            self.w[i] = new if math.isnan(old) or not m else math.sqrt(m * old**2 + (1 - m) * new**2)

    def feedback(self, indices, norms, step):
        dated = step if self.half_life is None else min(step, self.step)
        ages = self._elapsed(list(indices), step)
        for i, norm, age in zip(indices, norms, ages, strict=True):
            self._replace([i], np.full(self.n, norm, np.float32), [age])
            k = self.chunk_of[i]
            if math.isnan(self.base[k]):
                self.base[k] = dated - self.unit
            code = math.floor((dated - self.base[k]) / self.unit + 1e-6)
            if code > 255:
                self._move(k, code - 128)
                code = 128
            self.code[i] = max(code, 0)

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
        if self.half_life is not None:
            base_age = np.maximum(0.0, self.step - self.base)[self.chunk_of]
            kept = np.where(np.isnan(u), 0.0, 2.0 ** (-base_age / self.half_life + self.code / 8))
            f = kept * f + (1.0 - kept) * prior
        mean, variance = f[usable].mean(), f[usable].var()
        constants = [sampling.smoothing * mean, 1e-6 * mean]
        if sampling.max_coefficient is not None:
            constants.append(mean / (sampling.max_coefficient - 1.0))
        ess = sampling.ess_fraction
        if ess is not None:
            constants.append(math.sqrt(ess * variance / (1.0 - ess)) - mean)
        return (f + max(constants)) * usable, usable
