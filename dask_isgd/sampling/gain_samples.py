"""Samples for the gain, collected from the learner's own minibatches between two reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dask_isgd.sampling.draws import Draw, Floats
from dask_isgd.sampling.gate import Gate
from dask_isgd.sampling.sampler import ImportanceSampler
from dask_isgd.sampling.schedule import probe_version


class Sample(NamedTuple):
    """Norms of drawn examples, the coefficients they were drawn with, and their weights in the candidate proposal."""

    norms: Floats
    """(M,)"""
    coefficients: Floats
    """(M,)"""
    candidate: Floats
    """(M,) N q under the candidate proposal."""


class GainSamples:
    """Collects minibatches: all their draws for the curves, and for the gate those that the candidate covers.

    The candidate proposal is judged on examples in scored chunks; while the gate is closed, in those that were scored
    last, which are as fresh as all would be if all were scored. In a chunk that was never scored it is judged on the
    examples that were fed back, so that the gate opens on feedback alone. Its probabilities are those before the
    minibatch's own norms are fed back: afterwards it would seem to have known them.
    """

    def __init__(self, sampler: ImportanceSampler) -> None:
        self._sampler = sampler
        self._drawn: list[tuple[Floats, Floats]] = []
        self._candidate: list[Sample] = []

    def add(
        self, draws: Sequence[Draw], norms: Floats, gate: Gate, *, recent: bool = True, anywhere: bool = False
    ) -> None:
        """Add minibatches observed with the gate in its current state, before their norms (M,) are fed back.

        ``recent``: their probabilities are about those of the current proposal, and need not be computed again.
        ``anywhere``: the candidate is judged in every scored chunk, however old its scores are.
        """
        own = recent and gate.open and all(self._from_proposal(draw) for draw in draws)
        indices, c, q = (np.concatenate(part) for part in zip(*draws, strict=True)) if len(draws) > 1 else draws[0]
        self._drawn.append((norms, c))
        if gate.forced_closed:
            return
        versions = self._sampler.versions.take(indices // self._sampler.chunk_size)
        known = versions >= (0.0 if anywhere else self._judged_from(gate))
        never = np.isnan(versions)
        if never.any():  # no scorer has been there: its examples are judged by the weights that feedback gave them
            known |= never & self._sampler.has_weight(indices)
        if not known.any():
            return
        q = q[known] if own else self._sampler.probabilities(indices[known])
        self._candidate.append(Sample(norms[known], c[known], self._sampler.n * q))

    def _from_proposal(self, draw: Draw) -> bool:
        """Return whether a draw was made from the proposal; while the gate was closed, its probabilities are others."""
        c = draw.coefficients
        of_all = abs(c[0] * draw.probabilities[0] * self._sampler.n - 1.0) < 1e-9
        return bool(of_all and (c[0] != 1.0 or (c != 1.0).any()))

    def take(self) -> tuple[Floats, Floats, Sample | None]:
        """Remove and return the norms and coefficients of all draws since the last call, and the candidate's sample."""
        drawn, candidate = self._drawn, self._candidate
        self._drawn, self._candidate = [], []
        if not drawn:
            return np.empty(0), np.empty(0), None
        norms, coefficients = (np.concatenate(part) for part in zip(*drawn, strict=True))
        sample = Sample(*(np.concatenate(part) for part in zip(*candidate, strict=True))) if candidate else None
        return norms, coefficients, sample

    def state(self) -> list[Any]:
        """Return what was collected since the last ``take``, for :meth:`restore`."""
        return [[list(pair) for pair in self._drawn], [list(sample) for sample in self._candidate]]

    def restore(self, state: Sequence[Any]) -> None:
        """Continue from ``state()``."""
        self._drawn = [(norms, coefficients) for norms, coefficients in state[0]]
        self._candidate = [Sample(*arrays) for arrays in state[1]]

    def _judged_from(self, gate: Gate) -> float:
        """Return the version from which on a chunk's scores let the candidate be judged in it."""
        if gate.open or not (gate.probing or gate.scored_since):
            return 0.0
        probe = probe_version(self._sampler.versions)
        return probe if gate.probing else min(probe, gate.scored_since)
