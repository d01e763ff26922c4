"""How much importance sampling helps: measured from the learner's own minibatches, and acted on by the gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dask_isgd.learner.step import Learned
from dask_isgd.sampling import GainSamples, Gate, ImportanceSampler
from dask_isgd.sampling.variance import Variance, VarianceMonitor


class GainMonitor:
    """Collects the norms of drawn examples, and at each report updates variances, gains and the gate.

    ``reproducible``: use only the norms of the reporting steps, because what was collected between two
    reports is not part of a checkpoint. Not thread-safe; ``BatchSampler`` holds its lock around each call.
    """

    def __init__(self, sampler: ImportanceSampler, gate: Gate, *, reproducible: bool) -> None:
        self._sampler, self._gate, self._reproducible = sampler, gate, reproducible
        self._samples = GainSamples(sampler)
        self._variance = VarianceMonitor()
        self._open = gate.open
        """Whether the gate was open when the draws in the averages were made."""

    def observe(self, steps: Sequence[Learned], *, recent: bool = True, anywhere: bool = False) -> None:
        """Add the norms of steps, before they are fed back; if the last of them is measured, update the measurements.

        ``recent``: the draws were made by about the current weights, not many steps ahead. ``anywhere``: a closed gate
        judges the weights of all chunks by these norms, not only those that were scored last.
        """
        last = steps[-1]
        used = [each for each in steps if each.measured] if self._reproducible else steps
        if used:
            norms = np.concatenate([each.result.norms for each in used if each.result.norms is not None])
            self._samples.add([each.draw for each in used], norms, self._gate, recent=recent, anywhere=anywhere)
        if last.measured and np.isfinite(last.result.mean_gradient_sq_norm):
            self._measure(last.step, last.result.mean_gradient_sq_norm)

    def _measure(self, step: int, mean_gradient_sq_norm: float) -> None:
        norms, coefficients, candidate = self._samples.take()
        gate, variance, sampler = self._gate, self._variance, self._sampler
        if self._open != gate.open:
            self._open = gate.open
            variance.restart()
        share = sampler.uniform_share if gate.open else 1.0
        variance.observe(norms, coefficients, None, mean_gradient_sq_norm, uniform_share=share)
        if candidate is not None:
            variance.observe_candidate(*candidate)
        gate.observe(
            variance.candidate_gain if candidate is not None else math.nan,
            step,
            latest=variance.latest_candidate_gain,
            ideal=variance.variance.ideal_gain,
            all_known=sampler.all_known(gate.scored_since),
        )

    @property
    def variance(self) -> Variance:
        """The running means of the traces and of ||μ||²; NaN while they are unknown."""
        return self._variance.variance

    def row(self, step: int) -> dict[str, float]:
        """Return the columns of the history that describe the draws at ``step``."""
        variance, errors, factors = self._variance.variance, self._variance.errors, self._variance.factors
        return {
            "variance_ideal": variance.ideal,
            "variance_stale": variance.stale,
            "variance_uniform": variance.uniform,
            "variance_ideal_error": errors.ideal,
            "variance_stale_error": errors.stale,
            "variance_uniform_error": errors.uniform,
            "noise_scale": variance.noise_scale,
            "gain": self._variance.gain,
            "gain_error": errors.gain,
            "smoothing_factor": factors.smoothing,
            "staleness_factor": factors.staleness,
            "candidate_gain": self._variance.candidate_gain,
            "candidate_gain_error": errors.candidate_gain,
            "gate": float(self._gate.open),
            "gate_gain": self._gate.gain,
            "gate_state": float(self._gate.code),
            **self._sampler.stats(step),
        }

    def state(self) -> dict[str, Any]:
        """Return gate and measurements as plain JSON; the weights live in the weight array."""
        return {"gate": self._gate.state(), "monitor": self._variance.state(), "open": self._open}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""
        self._gate.restore(state["gate"])
        self._variance.restore(state["monitor"])
        self._open = bool(state["open"])

    def samples(self) -> list[Any]:
        """Return what was collected since the last measurement, as arrays, for :meth:`restore_samples`."""
        return self._samples.state()

    def restore_samples(self, state: Sequence[Any]) -> None:
        """Continue from ``samples()``."""
        self._samples.restore(state)
