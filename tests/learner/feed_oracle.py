"""A proposal that is written out, for tests of what is drawn from it."""

from __future__ import annotations

import numpy as np

from dask_isgd.sampling import Draw


class Explicit:
    """Draws with the probabilities ``q`` (N,), which a test may change at any time."""

    def __init__(self, q, batch=8, seed=0):
        self.q = np.asarray(q, float) / np.sum(q)
        self.batch, self.seed = batch, seed
        self.gate_step = -1
        self.drawn = []

    def draw(self, step, attempt=0):
        self.drawn.append(step)
        generator = np.random.default_rng((self.seed, step, attempt))
        indices = generator.choice(len(self.q), self.batch, p=self.q)
        return Draw(indices, 1 / (len(self.q) * self.q[indices]), self.q[indices])

    def unreadable(self, error):
        raise error


def uniform(n, **options):
    return Explicit(np.ones(n), **options)
