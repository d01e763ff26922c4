"""What the learner draws from: sampler, gate and variance monitor behind one lock.

A feed may draw ahead in a thread while the loop updates weights, so every access is locked.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import DataError
from dask_isgd.learner.feed import RowRange
from dask_isgd.learner.trainer import Step
from dask_isgd.sampling import ChunkSums, Draw, GainSamples, Gate, ImportanceSampler
from dask_isgd.sampling.draws import positions
from dask_isgd.sampling.variance import VarianceMonitor, from_chunk_sums
from dask_isgd.storage import WeightArray

logger = logging.getLogger(__name__)


class BatchSampler:
    """Draws minibatches and keeps account of what the draws are worth."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        sampling = spec.sampling
        if spec.learning.synchronous:  # fresh norms alone: a resumed run has no former ones to average with
            sampling = dataclasses.replace(sampling, ema_decay=0.0)
        self.sampler = ImportanceSampler(spec.examples, spec.chunk, sampling)
        self.gate = Gate(spec.sampling)
        self.monitor = VarianceMonitor()
        self.evidence = GainSamples(self.sampler)
        self._checks: list[ChunkSums] = []
        self.left_out: queue.SimpleQueue[str] = queue.SimpleQueue()
        """What cannot be read and is drawn no more, in words, to be said by the learner."""

    @property
    def open(self) -> bool:
        """Whether draws follow the weights."""
        return self.gate.open and not self._spec.sampling.uniform

    @property
    def idle(self) -> bool:
        """Whether scorers are left in peace: next to nothing is scored, or nothing."""
        return self._spec.sampling.uniform or self.gate.probing

    def draw(self, step: int) -> Draw:
        """The minibatch of a step; a function of seed, step and the weights in force alone."""
        generator = np.random.Generator(
            np.random.Philox(key=self._spec.learning.seed, counter=np.array([0, 0, 0, step], np.uint64))
        )
        with self._lock:
            return self._draw(self._spec.learning.batch_size, generator, self._kind(step))

    def run(self, size: int, generator: np.random.Generator) -> RowRange:
        """The run of ``size`` neighbours around one drawn example: picked with the sum of their probabilities."""
        with self._lock:
            one = self._draw(1, generator)
            start = int(one.indices[0]) // size * size
            rows = np.arange(start, min(start + size, self._spec.examples))
            return RowRange(start, self._probabilities(rows), 1.0 / float(one.coefficients[0] * one.probabilities[0]))

    def probabilities(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B,) q in force of ``indices`` (B,)."""
        with self._lock:
            return self._probabilities(indices)

    def positions(self, step: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """(B,) positions in [0, 1) of a step, spread as ``Sampling.scheme`` says, independent on a report."""
        return positions(self._kind(step), self._spec.learning.batch_size, generator)

    def _kind(self, step: int) -> str:
        # On a report ||μ||² is estimated, from products of draws: unbiased only if they are independent.
        report = (step + 1) % self._spec.learning.report_every == 0
        return "independent" if report else self._spec.sampling.scheme

    def _draw(self, batch: int, generator: np.random.Generator, kind: str | None = None) -> Draw:
        draw = self.sampler.draw if self.open else self.sampler.draw_uniform
        return draw(batch, generator, kind)

    def _probabilities(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        return (self.sampler.probabilities if self.open else self.sampler.uniform_probabilities)(indices)

    def unreadable(self, error: DataError) -> None:
        """Leave out the scoring chunk that holds ``error.rows``; raise ``error`` where the run is to skip none."""
        if error.rows is None or not self._spec.scoring.skip_bad_chunks:
            raise error
        chunk = error.rows[0] // self._spec.chunk
        with self._lock:
            self.sampler.leave_out(chunk)
        logger.warning("run %s goes on without scoring chunk %d: %s", self._spec.run, chunk, error)
        self.left_out.put(f"scoring chunk {chunk} is left out: {error}")

    def load(self, weights: WeightArray) -> None:
        """Take over what the weight array holds: the weights of an earlier incarnation.

        A chunk that is corrupt or gone counts as never scored.
        """
        versions, everything = weights.read_stamps()[:, 0], weights.read_all()
        for chunk in np.flatnonzero(np.isfinite(versions)).tolist():
            found = everything[slice(*weights.bounds(chunk))]
            if not np.isnan(found).all():
                self.update(chunk, found, int(versions[chunk]))

    def update(self, chunk: int, weights: NDArray[np.float32], version: int) -> None:
        """Fresh weights of a chunk, computed at ``version``."""
        with self._lock:
            sums = self.sampler.update(chunk, weights, version)
        if not self._spec.learning.synchronous:  # there the former weights depend on where the run was resumed
            self._checks.append(sums)

    def refresh(self, step: int) -> None:
        """Let the ages and the smoothing follow the step."""
        with self._lock:
            self.sampler.refresh(step)

    def learned(self, step: int, draw: Draw, result: Step, *, probe: bool) -> None:
        """What a step showed: its norms are evidence (weighed on a probe), and fed back."""
        if result.norms is None:
            return
        with self._lock:
            # Samples gathered between probes are not part of a checkpoint; synchronous runs resume bit for bit.
            if probe or not self._spec.learning.synchronous:
                self.evidence.add(draw, result.norms, self.gate)
            if probe and np.isfinite(result.mean_gradient_sq_norm):
                self._weigh(step, result.mean_gradient_sq_norm)
            if self._spec.sampling.feedback and not self._spec.sampling.uniform:
                self.sampler.feedback(draw.indices, result.norms, step)

    def _weigh(self, step: int, mean_gradient_sq_norm: float) -> None:
        norms, coefficients, candidate = self.evidence.take()
        share = self.sampler.uniform_share if self.open else 1.0
        self.monitor.observe(norms, coefficients, None, mean_gradient_sq_norm, uniform_share=share)
        if candidate is not None:
            self.monitor.observe_candidate(*candidate)
            self.gate.observe(self.monitor.candidate_gain, step, all_scored=self.sampler.all_scored)

    def report(self, step: int) -> dict[str, float]:
        """The row of the history that speaks of draws."""
        with self._lock:
            stats = self.sampler.stats(step)
        variance, errors, factors = self.monitor.variance, self.monitor.errors, self.monitor.factors
        return {
            "variance_ideal": variance.ideal,
            "variance_stale": variance.stale,
            "variance_uniform": variance.uniform,
            "variance_ideal_error": errors.ideal,
            "variance_stale_error": errors.stale,
            "variance_uniform_error": errors.uniform,
            "gain": self.monitor.gain,
            "gain_error": errors.gain,
            "smoothing_factor": factors.smoothing,
            "staleness_factor": factors.staleness,
            "candidate_gain": self.monitor.candidate_gain,
            "candidate_gain_error": errors.candidate_gain,
            "chunk_gain": self._chunk_gain(),
            "gate": float(self.open),
            "gate_gain": self.gate.gain,
            "gate_state": float(self.gate.code),
            **stats,
        }

    def _chunk_gain(self) -> float:
        """Gain from the chunk sums since the last report: a check, overstates staleness."""
        checks, self._checks = [c for c in self._checks if c.count > 0], []
        if not checks:
            return math.nan
        norms, squares, over, proposal, count = (
            [getattr(c, name) for c in checks]
            for name in ("norms", "squares", "squares_over_proposal", "proposal", "count")
        )
        return from_chunk_sums(norms, squares, over, proposal, count, mean_gradient_sq_norm=0.0).gain

    def state(self) -> dict[str, Any]:
        """Gate and monitor as plain JSON; the weights live in the weight array."""
        return {"gate": self.gate.state(), "monitor": self.monitor.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.gate.restore(state["gate"])
        self.monitor.restore(state["monitor"])
