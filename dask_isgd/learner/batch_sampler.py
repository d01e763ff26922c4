"""What the learner draws minibatches from: the sampler and its gate behind one lock.

A feed may draw ahead in a thread while the loop updates weights, so every access is locked.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.config import Sampling
from dask_isgd.errors import DataError
from dask_isgd.learner.gain_monitor import GainMonitor
from dask_isgd.learner.step import Learned, Step
from dask_isgd.sampling import Draw, Gate, ImportanceSampler
from dask_isgd.sampling.draws import Floats, block_positions
from dask_isgd.storage import WeightArray

logger = logging.getLogger(__name__)


BLOCK = 8
"""Minibatches that are drawn by one search, unless their number is given."""
_RECENT = 2
"""Blocks after a draw within which its probabilities count as those of the current proposal, for the gate."""


class BatchSampler:
    """Draws minibatches from ``n`` examples, and keeps the weights they are drawn by up to date.

    ``report_every``: at every such step the draws are independent, so that the report's estimates are unbiased.
    ``reproducible``: a resumed run draws what an uninterrupted one does. ``skip_bad_chunks``: scoring chunks whose
    rows cannot be read are left out; otherwise they raise their error. ``scored``: whether scorers bring weights; if
    not, they all come from the minibatches themselves. ``keep_feedback``: a checkpoint has the weights even where some
    were scored, as scoring may end. ``block``: minibatches per search, one if ``reproducible``. ``pool``: minibatches
    that are drawn as one, from which one is chosen.
    """

    def __init__(
        self,
        n: int,
        chunk_size: int,
        batch_size: int,
        sampling: Sampling,
        *,
        seed: int,
        report_every: int,
        reproducible: bool = False,
        skip_bad_chunks: bool = False,
        scored: bool = True,
        keep_feedback: bool = False,
        block: int = BLOCK,
        pool: int = 1,
    ) -> None:
        self._batch_size, self._seed, self._report_every = batch_size, seed, report_every
        self._sampling, self._skip_bad_chunks, self._scored = sampling, skip_bad_chunks, scored
        self._keep_feedback, self._size = keep_feedback, batch_size * pool
        self._lock = threading.Lock()
        if reproducible:  # fresh norms only: a resumed run has no former norms to average with
            sampling = dataclasses.replace(sampling, ema_decay=0.0)
        self.sampler = ImportanceSampler(n, chunk_size, sampling)
        self.gate = Gate(sampling)
        self.monitor = GainMonitor(self.sampler, self.gate, reproducible=reproducible)
        self.block = 1 if reproducible else block
        """Minibatches per search; norms are worth feeding back once per block."""
        self._drawn: dict[int, Draw] = {}
        self.left_out: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Descriptions of chunks that cannot be read and are drawn no more; the learner reports them."""
        self._steps = self._fed_back = 0
        self._newest = -1
        """The step that was drawn last."""
        self.gate_step = -1
        """The step after which the gate last opened or closed; -1: never."""

    @property
    def open(self) -> bool:
        """Whether draws follow the weights."""
        return self.gate.open

    @property
    def idle(self) -> bool:
        """Whether scorers are idle, or nearly: nothing is to be scored, or the gate is closed and a probe is enough."""
        return not self._scored or self._sampling.uniform or self.gate.probing

    def draw(self, step: int, attempt: int = 0) -> Draw:
        """Return the minibatch of a step; each ``attempt`` draws another one.

        It depends only on the seed, the step, the attempt, and the weights when the first minibatch of its block was
        drawn. A block is searched at once: a search for one minibatch takes a tenth of a small model's step.
        """
        with self._lock:
            self._newest = step
            if attempt or self.block == 1:
                return self._draw([step], attempt)[0]
            if step not in self._drawn:
                steps = range(step, (step // self.block + 1) * self.block)
                self._drawn = dict(zip(steps, self._draw(steps), strict=True))
            return self._drawn[step]

    def is_drawn(self, step: int) -> bool:
        """Whether the minibatch of a step was drawn with others of its block, so that ``draw`` only returns it."""
        return step in self._drawn

    def _draw(self, steps: Sequence[int], attempt: int = 0) -> list[Draw]:
        draw_at = self.sampler.draw_at if self.open else self.sampler.draw_uniform_at
        return draw_at(self._positions(steps, attempt).reshape(-1)).split(self._size)

    def _positions(self, steps: Sequence[int], attempt: int) -> Floats:
        """Return (steps, batch) the positions of minibatches of one block: rows of those of the whole block."""
        first = steps[0] - steps[0] % self.block
        generator = np.random.Generator(
            np.random.Philox(key=self._seed, counter=np.array([0, 0, attempt, first], np.uint64))
        )
        schemes = [self._kind(step) for step in range(first, first + self.block)]
        return block_positions(schemes, self._size, generator)[steps[0] - first :][: len(steps)]

    def _kind(self, step: int) -> str:
        # At a report ||μ||² is estimated from products of draws, which is unbiased only if they are independent.
        report = (step + 1) % self._report_every == 0
        return "independent" if report else self._sampling.scheme

    def unreadable(self, error: DataError) -> None:
        """Leave out the scoring chunk that holds ``error.rows``; raise ``error`` unless the run skips bad chunks."""
        if error.rows is None or not self._skip_bad_chunks:
            raise error
        chunk = error.rows[0] // self.sampler.chunk_size
        with self._lock:
            self.sampler.leave_out(chunk)
            self._drawn = {}  # they were drawn with this chunk; which ones does not depend on them
        logger.warning("the run continues without scoring chunk %d: %s", chunk, error)
        self.left_out.put(f"scoring chunk {chunk} is left out: {error}")

    def load(self, weights: WeightArray) -> None:
        """Load the weights that an earlier incarnation left in the weight array.

        A chunk that is corrupt or missing counts as never scored.
        """
        versions, everything = weights.read_stamps()[:, 0], weights.read_all()
        for chunk in np.flatnonzero(np.isfinite(versions)).tolist():
            found = everything[slice(*weights.bounds(chunk))]
            if not np.isnan(found).all():
                self.update(chunk, found, int(versions[chunk]))

    def update(self, chunk: int, weights: NDArray[np.float32], version: int) -> None:
        """Replace the weights of a chunk by those computed at ``version``."""
        with self._lock:
            self.sampler.update(chunk, weights, version)

    def refresh(self, step: int) -> None:
        """Update the ages and the smoothing to ``step``."""
        with self._lock:
            self.sampler.refresh(step)

    def learned(self, step: int, draw: Draw, result: Step, *, measure: bool) -> None:
        """Use the norms of one step as :meth:`learned_all` does."""
        self.learned_all([Learned(step, draw, result, measure)])

    def learned_all(self, steps: Sequence[Learned]) -> None:
        """Use the norms of steps, if there are any: the monitor observes them, and the sampler is fed back."""
        self._steps += len(steps)
        known = [(each, each.result.norms) for each in steps if each.result.norms is not None]
        if not known:
            return
        with self._lock:
            if drawn := [each for each, _ in known if not each.chosen]:
                self._observe(drawn)
            if self._sampling.feedback and not self._sampling.uniform:
                indices = np.concatenate([each.draw.indices for each, _ in known])
                self.sampler.feedback(indices, np.concatenate([norms for _, norms in known]), known[-1][0].step)
                self._fed_back += len(known)

    def observe(self, steps: Sequence[Learned]) -> None:
        """Let the monitor observe norms of chunks that are about to be rewritten, and are the oldest, by ``update``."""
        with self._lock:
            self._observe(steps, anywhere=True)

    def _observe(self, steps: Sequence[Learned], *, anywhere: bool = False) -> None:
        for part in _up_to_measured(steps):
            was_open = self.open
            recent = self._newest - part[0].step <= _RECENT * self.block
            self.monitor.observe(part, recent=recent, anywhere=anywhere)
            if self.open != was_open:
                self.gate_step, self._drawn = part[-1].step, {}

    def rate_gain(self) -> float:
        """Return by which factor the variance of the draws allows a higher learning rate than that of uniform draws."""
        with self._lock:
            return self.monitor.variance.rate_gain(self._batch_size) if self.open else 1.0

    def report(self, step: int) -> dict[str, float]:
        """Return the columns of the history that describe the draws at ``step``."""
        with self._lock:
            wanted = self._sampling.feedback and not self._sampling.uniform and self._steps
            share = self._fed_back / self._steps if wanted else math.nan
            self._steps = self._fed_back = 0
            return {"feedback": share, **self.monitor.row(step)}

    def feedback_state(self) -> dict[str, Any]:
        """Return the weights for a checkpoint, if the weight array lacks them as all or many come from feedback."""
        with self._lock:
            return self.sampler.state() if self.sampler.from_feedback or self._keep_feedback else {}

    def restore_feedback(self, state: Mapping[str, Any]) -> None:
        """Continue from ``feedback_state()``, but for chunks that were scored since.

        Nothing changes if ages are now kept in other units, or all weights came from feedback and some are scored now.
        """
        with self._lock:
            if not state or state["half_life_steps"] != self._sampling.half_life_steps:
                return
            scored = ~np.isnan(self.sampler.versions)
            if self._keep_feedback:
                self.sampler.restore(state, but=np.flatnonzero(scored & ~(self.sampler.versions <= state["versions"])))
            elif not scored.any():
                self.sampler.restore(state)

    def state(self) -> dict[str, Any]:
        """Return all that a sampler needs that has no weight array to continue from: arrays and plain values."""
        with self._lock:
            return {
                "sampler": self.sampler.state(),
                "monitor": self.monitor.state(),
                "samples": self.monitor.samples(),
                "drawn": {step: list(draw) for step, draw in self._drawn.items()},
                "newest": self._newest,
                "gate_step": self.gate_step,
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""
        with self._lock:
            self.sampler.restore(state["sampler"])
            self.monitor.restore(state["monitor"])
            self.monitor.restore_samples(state["samples"])
            self._drawn = {step: Draw(*arrays) for step, arrays in state["drawn"].items()}
            self._newest, self.gate_step = state["newest"], state["gate_step"]


def _up_to_measured(steps: Sequence[Learned]) -> Iterator[Sequence[Learned]]:
    """Yield the steps in parts of which only the last step may be measured."""
    start = 0
    for stop, each in enumerate(steps, 1):
        if each.measured or stop == len(steps):
            yield steps[start:stop]
            start = stop
