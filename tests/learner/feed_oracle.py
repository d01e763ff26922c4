"""A proposal that is written out, for tests of what is drawn from it."""

from __future__ import annotations

import numpy as np

from dask_isgd.learner.feed import RowRange
from dask_isgd.sampling import Draw
from dask_isgd.sampling.draws import positions


class Explicit:
    """Draws with the probabilities ``q`` (N,), which a test may change at any time."""

    def __init__(self, q, batch=8, seed=0, kind="independent"):
        self.q = np.asarray(q, float) / np.sum(q)
        self.batch, self.kind = batch, kind
        self.seed = seed
        self.runs = []

    def draw(self, step):
        generator = np.random.default_rng((self.seed, step))
        indices = generator.choice(len(self.q), self.batch, p=self.q)
        return Draw(indices, 1 / (len(self.q) * self.q[indices]), self.q[indices])

    def run(self, size, generator):
        start = int(generator.choice(len(self.q), p=self.q)) // size * size
        self.runs.append(start // size)
        return RowRange(start, self.q[start : start + size].copy(), float(len(self.q)))

    def probabilities(self, indices):
        return self.q[indices]

    def positions(self, step, generator):
        return positions(self.kind, self.batch, generator)

    def unreadable(self, error):
        raise error


def uniform(n, **options):
    return Explicit(np.ones(n), **options)
