"""ImportanceBatchSampler: whole minibatches of indices with coefficients, for anybody's DataLoader."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import dask.config
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Sampler

from dask_isgd.config import Sampling
from dask_isgd.errors import ConfigError, LengthMismatchError
from dask_isgd.learner.batch_sampler import BLOCK, BatchSampler
from dask_isgd.learner.shares import Alone, Travelling, arrived_all, shares_of
from dask_isgd.learner.step import Learned, Step
from dask_isgd.loop.drawn_ahead import DrawnAhead, Minibatch
from dask_isgd.loop.state import arrays_of, tensors_of
from dask_isgd.loop.weighted import WeightedIndex
from dask_isgd.sampling import Draw

_MAX_BLOCK = 32
"""Minibatches per search: of more, the cost of each hardly falls."""
_weighted_index = partial(tuple.__new__, WeightedIndex)
"""Makes one of a pair; a call of the class takes four times as long."""


class _Reported(NamedTuple):
    minibatch: Minibatch
    scores: Travelling
    measured: bool


class ImportanceBatchSampler(Sampler[list[WeightedIndex]]):
    """Draws minibatches of ``n`` examples in proportion to their latest scores, for ``DataLoader(batch_sampler=...)``.

    ::

        sampler = isgd.ImportanceBatchSampler(len(dataset), 64)
        loader = DataLoader(isgd.Weighted(dataset), batch_sampler=sampler, num_workers=4)
        for index, coefficient, (x, y) in loader:
            with isgd.capture_norms(model) as capture:
                losses = F.cross_entropy(model(x), y, reduction="none")
                isgd.weighted_mean(losses, coefficient).backward()
            sampler.update(index, capture.norms(scale=coefficient / len(index)))
            ...

    A pass has ceil(``n`` / minibatch) minibatches, all of them full, with replacement: an example may be in none or in
    several. What is yielded carries the coefficient 1/(N q) of the very draw, however far ahead it is made.
    Until scores show that it pays, draws are uniform and coefficients 1, unless ``sampling`` has ``gate="open"``.

    In a process group of ``torch.distributed`` (``group``, or all processes), every process makes its own with the same
    arguments, and draws its share, ``batch_size`` examples, of one global minibatch. Then all processes call ``update``
    for the same minibatches. DDP's mean of the processes' gradients is unbiased.

    For one loop at a time, and not thread-safe. Raises ConfigError for settings that processes do not share.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.n, self.batch_size = n, batch_size
        self.sampling = Sampling() if sampling is None else sampling
        if batch_size < 1:
            raise ConfigError(f"batch_size: got {batch_size}, wanted at least 1")
        if self.sampling.presample != 1:
            raise ConfigError(
                f"Sampling.presample: got {self.sampling.presample}, wanted 1: only `fit` makes the forward pass for it"
            )
        self._shares = shares_of(group)
        self._shares.agree((n, batch_size, self.sampling, seed))
        self._share = slice(self._shares.rank * batch_size, (self._shares.rank + 1) * batch_size)
        block = _block(n, batch_size * self._shares.count)
        self._report_every = max(block, dask.config.get("isgd.learning.report-every"))
        self._batch_sampler = BatchSampler(
            n,
            self._chunk_size(),
            batch_size * self._shares.count,
            self.sampling,
            seed=seed,
            report_every=self._report_every,
            block=block,
        )
        self._ahead = DrawnAhead(self._share)
        self._again: deque[Minibatch] = deque()
        """Minibatches that were handed out once and not consumed; they come first."""
        self._reported: deque[_Reported] = deque()
        """What the loop reported and the weights do not reflect yet."""
        self._next = 0
        self._pass_start, self._pass = 0, 0
        self._measured = -1
        """The step that was measured last."""
        self._has_norms = False
        """Whether the loop reports scores."""

    def _chunk_size(self) -> int:
        """Return the examples per chunk of the sums for which a draw is about the cheapest: see benchmarks/loop.py."""
        return max(64, min(self.n, 1 << round(math.log2(2 * self.n) / 2)))

    def __len__(self) -> int:
        """Minibatches in a pass."""
        return -(-self.n // (self.batch_size * self._shares.count))

    def __iter__(self) -> Iterator[list[WeightedIndex]]:
        """Yield the minibatches of a pass, or of the rest of one after ``load_state_dict``."""
        position = 0
        if self._again or self._next - self._pass_start < len(self):  # the former pass was broken off
            position = self._position
            self._again.extendleft(reversed(self._ahead.take_back()))
        return self._minibatches(position)

    def _minibatches(self, position: int) -> Iterator[list[WeightedIndex]]:
        self._pass += 1
        number = self._pass
        self._next = self._again[0].step if self._again else self._next
        self._pass_start = self._next - position
        for _ in range(position, len(self)):
            if number != self._pass:
                raise ConfigError(
                    "ImportanceBatchSampler: another pass began while this one was iterated, wanted one at a time; "
                    "give each DataLoader a sampler of its own"
                )
            minibatch = self._again.popleft() if self._again else Minibatch(self._next, self._draw(self._next))
            self._next = minibatch.step + 1
            self._ahead.add(minibatch)
            draw = minibatch.draw
            indices, coefficients = draw.indices[self._share], draw.coefficients[self._share]
            yield list(map(_weighted_index, zip(indices.tolist(), coefficients.tolist(), strict=True)))

    def _draw(self, step: int) -> Draw:
        if not self._batch_sampler.is_drawn(step):
            self._use_reports(keep=0 if isinstance(self._shares, Alone) else 1)
        return self._batch_sampler.draw(step)

    # Scores

    def update(self, indices: Tensor | ArrayLike, scores: Tensor | ArrayLike | None = None) -> None:
        """Report that a minibatch was consumed, and use the scores of its examples.

        ``indices`` (B,) as the DataLoader delivered them; ``scores`` (B,), not negative: gradient norms at the
        parameters before the step, ``capture.norms(scale=coefficient / B)``, or losses. None: there are no scores of
        this minibatch (what ``capture.norms`` returns then). Call it once per minibatch, before ``state_dict``. One
        that was skipped counts as consumed with the next one.

        Minibatches are drawn 8 at a time, of millions of examples up to 32: scores are used from the next block on,
        and what the DataLoader has taken ahead is drawn already. In a process group every process passes its own
        share; draws lack the latest minibatch's scores, which travel while the next step is made.

        Raises DataError for indices of no minibatch that waits, LengthMismatchError for too few or too many scores.
        """
        wanted = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices, np.int64)
        found = None if scores is None else torch.as_tensor(scores)
        if found is not None and found.shape != wanted.shape:
            raise LengthMismatchError(
                f"update: got scores of shape {tuple(found.shape)} for indices of shape {wanted.shape}, wanted one per "
                "index"
            )
        minibatch = self._ahead.consume(wanted)
        if found is None:
            return
        self._has_norms = True
        every = self._report_every
        measured = (minibatch.step + 1) // every > (self._measured + 1) // every
        if measured:
            self._measured = minibatch.step
        travelling = self._shares.gather(found, (minibatch.step, self._next))
        self._reported.append(_Reported(minibatch, travelling, measured))

    def _use_reports(self, *, keep: int) -> None:
        """Use all scores but those of the last ``keep`` minibatches, which travel."""
        used = [self._reported.popleft() for _ in range(len(self._reported) - keep)]
        # The mean gradient is the loop's own affair; gains are ratios of second moments, which need none.
        learned = [
            Learned(each.minibatch.step, each.minibatch.draw, Step(np.nan, scores, 0.0, np.nan, False), each.measured)
            for each, scores in zip(used, arrived_all([each.scores for each in used]), strict=True)
        ]
        if learned:
            self._batch_sampler.learned_all(learned)
            if any(each.measured for each in learned):
                self._batch_sampler.refresh(learned[-1].step + 1)

    def load_scores(self, scores: Any) -> None:
        """Replace all weights by scores of all examples, such as those that ``isgd.score`` wrote.

        ``scores`` (N,) is an array of any kind that can be sliced, not negative; a NaN keeps what was known. They count
        as computed at the current step. Raises NonFiniteNormsError if more than 1 % of a chunk with scores are bad.
        """
        sampler = self._batch_sampler.sampler
        if tuple(scores.shape) != (self.n,):
            raise LengthMismatchError(f"load_scores: got scores of shape {tuple(scores.shape)}, wanted ({self.n},)")
        for chunk in range(sampler.n_chunks):
            start = chunk * sampler.chunk_size
            found = np.asarray(scores[start : min(self.n, start + sampler.chunk_size)])
            if not np.isnan(found).all():
                self._batch_sampler.update(chunk, found, self._next)

    # What is measured

    @property
    def processes(self) -> int:
        """How many processes share each minibatch."""
        return self._shares.count

    @property
    def open(self) -> bool:
        """Whether the gate is open, so that draws follow the scores; otherwise they are uniform."""
        return self._batch_sampler.open

    @property
    def gain(self) -> float:
        """Second moment of the gradient under uniform draws over that of the draws made; NaN before 20 minibatches.

        It is measured from the scores: a gain only if these are gradient norms.
        """
        return self.report()["gain"]

    @property
    def candidate_gain(self) -> float:
        """The gain that draws by the scores have or would have, open gate or not; the gate follows it."""
        return self.report()["candidate_gain"]

    def report(self) -> dict[str, float]:
        """Return gains, gate and proposal in numbers, by the names of the columns of a run's history."""
        row = self._batch_sampler.monitor.row(self._next)
        return {name: value for name, value in row.items() if not name.startswith("variance")}

    # Resuming

    @property
    def _position(self) -> int:
        """Minibatches of the current pass that are consumed."""
        return self.consumed - self._pass_start

    @property
    def consumed(self) -> int:
        """Minibatches consumed so far; all that were handed out if the loop does not report what it consumes."""
        pending = [*self._ahead.pending, *self._again]
        return pending[0].step if pending else self._next

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed loop needs: tensors and plain values, which ``torch.load`` loads with weights only.

        What the DataLoader has taken ahead and the loop has not consumed is part of it, and yielded again. 5 bytes per
        example and a little more. In a process group the state of one process is that of all.
        """
        return {
            "n": self.n,
            "minibatch": self.batch_size * self._shares.count,
            "next": self._next,
            "position": self._position,
            "measured": self._measured,
            "reports": self._ahead.reports,
            "ahead": [_plain(each) for each in [*self._ahead.pending, *self._again]],
            "reported": [(*_plain(m), torch.from_numpy(s.arrived()), measured) for m, s, measured in self._reported],
            "sampler": tensors_of(self._batch_sampler.state()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``: the next pass is the rest of the one that was interrupted.

        The resumed loop draws the minibatches that the uninterrupted one draws, if its DataLoader looks as far ahead.
        Raises ConfigError for the state of another number of examples or another (global) minibatch.
        """
        wanted = self.n, self.batch_size * self._shares.count
        if (state["n"], state["minibatch"]) != wanted:
            raise ConfigError(
                f"load_state_dict: got a state of {state['n']} examples and a global minibatch of {state['minibatch']}"
                f", wanted {wanted[0]} and {wanted[1]}; keep the product of batch_size and processes"
            )
        self._batch_sampler.restore(arrays_of(state["sampler"]))
        self._ahead = DrawnAhead(self._share)
        self._ahead.reports = state["reports"]
        self._again = deque(_minibatch(each) for each in state["ahead"])
        self._reported = deque(
            _Reported(_minibatch(each), Alone().gather(each[-2], (0, 0)), each[-1]) for each in state["reported"]
        )
        self._measured = state["measured"]
        self._next = self._again[0].step if self._again else state["next"]
        self._pass_start = self._next - state["position"]
        self._pass += 1


def _plain(minibatch: Minibatch) -> tuple[Any, ...]:
    return minibatch.step, *(torch.from_numpy(array.copy()) for array in minibatch.draw)


def _minibatch(plain: Any) -> Minibatch:
    step, *tensors = plain[:4]
    return Minibatch(step, Draw(*(tensor.numpy().copy() for tensor in tensors)))


def _block(n: int, minibatch: int) -> int:
    """Return the minibatches that are drawn, and whose scores are used, at once.

    A block lacks its own scores, which matters only for an example that it draws twice. So it may be larger, and the
    fixed cost of a search and of an update smaller, if it is a thousandth of the examples at most.
    """
    return min(_MAX_BLOCK, max(BLOCK, n // (1000 * minibatch)))
