"""The batch sampler of a loop whose weights come from scorers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dask_isgd.config import Sampling
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.step import Learned, Step
from dask_isgd.loop.batch_sampler import ImportanceBatchSampler
from dask_isgd.loop.chunk_gain import draw_in_chunk
from dask_isgd.loop.cluster_link import Rewritten
from dask_isgd.sampling import Draw

_CHUNKS = 8
"""Chunks per measurement of the gain: of fewer, whose examples may be alike, it would say little."""


class ScoredBatchSampler(ImportanceBatchSampler):
    """An ``ImportanceBatchSampler`` into which scorers put weights; ``Scorers.batch_sampler`` makes it.

    ``update`` need not be called. If it is called with norms, these are weights too, and the gain is measured from
    them; otherwise it is measured from the scorers' own, chunk by chunk (``chunk_gain``).

    ``rewritten`` returns the chunks that were rewritten since its last call; in a process group only process 0 calls
    it, and the others receive the same. ``start``: the first step.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        chunk_size: int,
        sampling: Sampling,
        seed: int,
        start: int,
        known: Sequence[Rewritten],
        rewritten: Callable[[], Sequence[Rewritten]],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._scoring_chunk, self._rewritten = chunk_size, rewritten
        super().__init__(n, batch_size, sampling=sampling, seed=seed, group=group)
        self._next = self._pass_start = start
        self._chunks_observed = 0
        """Chunks since the latest measurement."""
        self._rng = np.random.default_rng((seed, start))
        self.scored = 0
        """Scores received since the loop began."""
        self._updated = False
        """Whether the loop calls ``update``."""
        self._known: Sequence[Rewritten] = self._shares.from_first(known)
        """What was scored before the loop began."""
        self._use_known()

    def _use_known(self) -> None:
        versions = self._batch_sampler.sampler.versions
        for chunk, weights, version in self._known:
            if not versions[chunk] >= version:
                self._batch_sampler.update(chunk, weights, version)

    @property
    def drawing(self) -> BatchSampler:
        """What the reports of the run describe."""
        return self._batch_sampler

    @property
    def minibatch(self) -> int:
        """Examples per step, of all processes together."""
        return self.batch_size * self._shares.count

    def made(self, step: int) -> None:
        """Report that the loop has made ``step``: a loop that does not call ``update`` has consumed its minibatch."""
        if not self._updated:
            self._ahead.consume_to(step)

    def update(self, indices: Tensor | ArrayLike, scores: Tensor | ArrayLike | None = None) -> None:
        self._updated = True
        super().update(indices, scores)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._use_known()

    def _chunk_size(self) -> int:
        return self._scoring_chunk

    def _draw(self, step: int) -> Draw:
        if not self._batch_sampler.is_drawn(step):
            self._receive(step)
        return super()._draw(step)

    def _receive(self, step: int) -> None:
        """Use the rewritten chunks before the block of ``step`` is drawn: all processes at the same point."""
        self._known = []
        for chunk, weights, version in self._shares.from_first(self._rewritten() if self._shares.rank == 0 else []):
            if not self._has_norms:
                self._observe(step, chunk, weights)
            self._batch_sampler.update(chunk, weights, version)
            self.scored += len(weights)
        self._batch_sampler.refresh(step)

    def _observe(self, step: int, chunk: int, weights: NDArray[np.float32]) -> None:
        """Let the fresh weights of a chunk show the gain of those that they replace."""
        drawing = self._batch_sampler
        found = draw_in_chunk(drawing.sampler, chunk, weights, self._rng, uniform=not drawing.open)
        if found is None:
            return
        draw, norms = found
        self._chunks_observed += 1
        later = step // self._report_every > self._measured // self._report_every
        measured = later and self._chunks_observed >= min(_CHUNKS, drawing.sampler.n_chunks)
        if measured:
            self._measured, self._chunks_observed = step, 0
        drawing.observe([Learned(step, draw, Step(math.nan, norms, 0.0, math.nan, False), measured)])
