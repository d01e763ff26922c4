"""Learner and scorers in virtual time, without a model: the norms of all examples are given at every step.

Batch sampler, monitor, gate and the order in which chunks are scored are the library's own. Scorers score ``speed``
examples per example learned, a twentieth of that while the gate only probes; each chunk with the latest version when
its scoring begins, and its norms arrive when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dask_isgd.config import Sampling
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.step import Step
from dask_isgd.sampling import next_chunks
from dask_isgd.sampling.schedule import PROBE_SHARE

CHUNK, BATCH, PUBLISH_EVERY, REPORT_EVERY = 256, 64, 32, 20

Norms = Callable[[int], NDArray[np.float64]]


class Simulation:
    """``norms(step)`` returns the gradient norms (N,) of all examples at the parameters of a step."""

    def __init__(
        self, norms: Norms, *, seed: int, speed: float = 4.0, batch: int = BATCH, reproducible: bool = False, **settings
    ) -> None:
        self.norms, self.speed, self.batch = norms, speed, batch
        self.n = len(norms(0))
        self.batch_sampler = BatchSampler(
            self.n, CHUNK, batch, Sampling(**settings), seed=seed, report_every=REPORT_EVERY, reproducible=reproducible
        )
        self.gate, self.sampler = self.batch_sampler.gate, self.batch_sampler.sampler
        self.versions = np.full(self.sampler.n_chunks, np.nan)
        self.step = self.version = 0
        self.examples_scored = 0
        self._ready, self._scoring = 0.0, None
        self.open: list[bool] = []
        """Whether the gate was open, per step."""

    def run(self, steps: int, *, until: Callable[[Simulation], bool] = lambda _: False) -> int:
        """Take up to ``steps`` steps, fewer once ``until`` is true; return how many."""
        for taken in range(1, steps + 1):
            self._take_step()
            if until(self):
                return taken
        return steps

    def gain(self) -> float:
        """Return the exact gain of the proposal over uniform draws, whether or not the gate is open."""
        g, q = self.norms(self.step), self.sampler.probabilities()
        return float((g * g).mean() / (g * g / q).mean() * self.n)

    def _take_step(self) -> None:
        if self.step % PUBLISH_EVERY == 0:
            self.version = self.step
            self.batch_sampler.refresh(self.step)
        self._score()
        draw = self.batch_sampler.draw(self.step)
        g = self.norms(self.step)[draw.indices]
        measure = (self.step + 1) % REPORT_EVERY == 0
        self.open.append(self.gate.open)
        self.batch_sampler.learned(
            self.step, draw, Step(1.0, g, 0.0 if measure else math.nan, 1.0, False), measure=measure
        )
        self.step += 1

    def _score(self) -> None:
        while self.speed and self._ready <= self.step:
            if self._scoring is not None:
                chunk, version = self._scoring
                norms = self.norms(version)[chunk * CHUNK : (chunk + 1) * CHUNK]
                self.batch_sampler.update(chunk, norms.astype(np.float32), version)
                self.versions[chunk] = version
                self.examples_scored += len(norms)
            self._scoring = next_chunks(self.versions, [], 1)[0], self.version
            self._ready += CHUNK / (self.speed * self.batch) / (PROBE_SHARE if self.gate.probing else 1.0)
