"""Takes a group's steps on rank 0: it alone draws, and uses the norms of all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable

from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.feedback_pace import FeedbackPace
from dask_isgd.learner.gradient_sum import GroupLostError
from dask_isgd.learner.group.packet import STEPS, Packet, Stretch
from dask_isgd.learner.group.rank import GatheredStep, Rank
from dask_isgd.learner.group.shared_draws import Drawn
from dask_isgd.learner.reporter import Reporter
from dask_isgd.learner.step import Learned
from dask_isgd.learner.stepper import Stepper
from dask_isgd.sampling import Draw
from dask_isgd.sampling.variance import square_of_mean

_LONGEST = 0.5
"""Seconds of a stretch, about, at most: the group cannot stop within one."""
_WAITING_EVERY = 1.0


class GroupStepper(Stepper):
    """Takes steps in stretches, which end with a block of draws, a measured step, or half a second.

    Within a stretch nothing but gradients travels. At its end the norms of all ranks are used as those of a single
    learner's minibatches are, and the minibatches of the next one are drawn and sent; for feeds that look ahead
    ``lookahead`` steps, that many steps earlier. The first step is ``step``. Where ranks average, a stretch ends with
    the last average that it could hold, and the group stops at such an end only.
    """

    def __init__(
        self,
        rank: Rank,
        batch_sampler: BatchSampler,
        reporter: Reporter,
        report: Callable[[int], None],
        *,
        pace: FeedbackPace | None,
        report_every: int,
        lookahead: int,
        step: int,
    ) -> None:
        super().__init__(
            rank.trainer, rank.feed, batch_sampler, reporter, report, pace=pace, report_every=report_every, lag=0
        )
        self._rank, self._lookahead = rank, lookahead
        self._stretch = Stretch(step, 0, 0, 0)
        self._taken = 0
        """Steps of the stretch that are taken."""
        self._averaging = rank.trainer.averaging
        self._drawn: dict[int, Draw] = {}
        """Minibatches that were sent, and whose norms have not arrived."""
        self._drawn_until = 0
        self._seconds = 0.0
        """Duration of a recent step."""
        self._sent = self._began = time.monotonic()
        self._gathering = 0.0
        """Seconds in which norms were gathered."""

    @property
    def next_step(self) -> int:
        """The first step that no rank has taken."""
        return self._stretch.first + self._taken

    @property
    def learners(self) -> int:
        return self._rank.shares.count

    @property
    def waited(self) -> float:
        return self._rank.trainer.waited + self._gathering

    @property
    def at_rest(self) -> bool:
        return self._is_over and (self._averaging is None or self._averaging.is_due(self.next_step))

    @property
    def _is_over(self) -> bool:
        """Whether all steps of the stretch are taken."""
        return self._taken == self._stretch.steps

    def take(self, step: int, until: int) -> None:
        """Launch ``step``; nothing is drawn ahead for ``until`` or later.

        Raises NonFiniteLossError of this step or an earlier one, and GroupLostError.
        """
        if self._is_over:
            self._begin(step, until)
        self._rank.take(step, self._stretch)
        self._taken += 1
        if self._is_over:
            self._collect()

    def settle(self, lag: int = 0) -> None:
        """Wait for the steps taken. Raises NonFiniteLossError. Their results are used at the end of the stretch."""
        self._rank.check()

    def keep_waiting(self) -> None:
        if time.monotonic() - self._sent >= _WAITING_EVERY:
            self._send(Packet(Stretch(0, 0, 0, 0), {}))

    def end(self) -> None:
        with contextlib.suppress(GroupLostError):
            self._send(Packet(Stretch(0, 0, 0, 0, end=True), {}))

    def _send(self, packet: Packet) -> None:
        self._rank.send(packet)
        self._sent = time.monotonic()

    def _begin(self, step: int, until: int) -> None:
        """Choose the next stretch, and draw and send its minibatches."""
        block, every = self._batch_sampler.block, self._report_every
        count = min(block, max(1, int(_LONGEST / max(self._seconds, 1e-9))))
        stop = min(until, step + count, (step // block + 1) * block, (step // every + 1) * every)
        if self._averaging is not None:
            stop = max((s for s in range(step + 1, stop + 1) if self._averaging.is_due(s)), default=stop)
        norms = sum((self._pace is not None and self._pace.norms(s)) << (s - step) for s in range(step, stop))
        self._stretch, self._taken = Stretch(step, stop - step, norms, until, rate=self._rate_factor()), 0
        self._drawn_until = max(self._drawn_until, step)
        more = True
        while more:
            ahead = min(until, stop + self._lookahead)
            steps = range(self._drawn_until, min(ahead, self._drawn_until + STEPS))
            draws = {s: self._batch_sampler.draw(s) for s in steps}
            self._drawn |= draws
            self._drawn_until = max(self._drawn_until, steps.stop)
            more = self._drawn_until < ahead
            drawn = {s: Drawn(draw.indices, draw.coefficients) for s, draw in draws.items()}
            self._send(Packet(self._stretch, drawn, more))
        self._began = time.monotonic()

    def _collect(self) -> None:
        """Use the results of the stretch. Raises GroupLostError if a rank's worker leaves."""
        done = self._rank.results()
        began = time.monotonic()
        try:
            gathered = self._rank.gather(done, leaving=False)
        except GroupLostError:  # the steps are taken and will be committed: they are reported, without norms
            alone = (each._replace(result=dataclasses.replace(each.result, norms=None)) for each in done)
            self._use([self._learned(each) for each in alone])
            raise
        self._gathering += time.monotonic() - began
        self._seconds = (time.monotonic() - self._began) / self._stretch.steps
        self._use([self._learned(each) for each in gathered.steps])
        if gathered.leaving:
            self.end()
            raise GroupLostError(f"the workers of ranks {gathered.leaving} leave")

    def _learned(self, each: GatheredStep) -> Learned:
        draw, result = self._drawn.pop(each.step), each.result
        if each.measured and result.norms is not None and self._averaging is None:
            square = square_of_mean(result.gradient_norm, draw.coefficients, result.norms)
            result = dataclasses.replace(result, mean_gradient_sq_norm=square)
        return Learned(each.step, draw, result, each.measured)
