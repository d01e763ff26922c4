"""Takes the learner's steps: draws a minibatch, launches the update, and uses its result once the device is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.feed import Feed
from dask_isgd.learner.feedback_pace import FeedbackPace
from dask_isgd.learner.presampling import Presampler
from dask_isgd.learner.reporter import Reporter
from dask_isgd.learner.step import LaunchedStep, Learned
from dask_isgd.learner.trainer import Trainer
from dask_isgd.sampling import Draw


class _Pending(NamedTuple):
    draw: Draw
    launched: LaunchedStep
    measured: bool
    chosen: bool


class Stepper:
    """Takes steps with minibatches of ``feed``; ``lag`` of them may be under way on the device.

    Results are used once per block of the ``batch_sampler``, and after each measured step. The norms of the steps that
    ``pace`` chooses go back to the sampler (None: of no step). Every ``report_every`` steps the gradient is measured,
    and ``report`` is called with the number of steps made once the result has arrived. With a ``presampler`` the feed
    has pools, from which examples are chosen, but for measured steps and while draws are uniform.
    """

    def __init__(
        self,
        trainer: Trainer,
        feed: Feed,
        batch_sampler: BatchSampler,
        reporter: Reporter,
        report: Callable[[int], None],
        *,
        pace: FeedbackPace | None,
        report_every: int,
        lag: int,
        presampler: Presampler | None = None,
    ) -> None:
        self._trainer, self._feed, self._batch_sampler, self._reporter = trainer, feed, batch_sampler, reporter
        self._report, self._pace, self._report_every, self._lag = report, pace, report_every, lag
        self._presampler = presampler
        self._pending: deque[_Pending] = deque()
        self._block_start = time.perf_counter()

    def take(self, step: int, until: int) -> None:
        """Launch ``step``; nothing is drawn ahead for ``until`` or later.

        Raises NonFiniteLossError of this step or an earlier one.
        """
        measure = (step + 1) % self._report_every == 0
        batch = self._feed(step, until)
        chosen = self._presampler is not None and self._batch_sampler.open and not measure
        if self._presampler is not None:
            batch = self._presampler.choose(batch) if chosen else self._presampler.first(batch)
        self._trainer.update.rate_factor = self._rate_factor()
        launched = self._trainer.launch(
            step,
            batch.inputs,
            batch.targets,
            batch.draw.coefficients,
            norms=self._pace is not None and self._pace.norms(step),
            measure=measure,
            indices=batch.draw.indices,
        )
        self._pending.append(_Pending(batch.draw, launched, measure, chosen))
        if measure or (step + 1) % self._batch_sampler.block == 0:
            self.settle(self._lag)

    def settle(self, lag: int = 0) -> None:
        """Wait for all steps but the last ``lag``, and use their results. Raises NonFiniteLossError.

        Done before anything is published or committed.
        """
        arrived = []
        while len(self._pending) > lag:
            draw, launched, *how = self._pending.popleft()
            arrived.append(Learned(launched.step, draw, launched.result(), *how))
        if arrived:
            self._use(arrived)

    @property
    def learners(self) -> int:
        """Learners that share each minibatch."""
        return 1

    @property
    def waited(self) -> float:
        """Seconds in which other learners were waited for, of all steps."""
        return 0.0

    @property
    def at_rest(self) -> bool:
        """Whether the run may stop before the next step: other learners take none meanwhile."""
        return True

    def keep_waiting(self) -> None:
        """Tell other learners, if there are any, that the next step will be some time yet."""

    def end(self) -> None:
        """Tell other learners, if there are any, that there is no next step."""

    def _rate_factor(self) -> float:
        return self._batch_sampler.rate_gain() if self._trainer.learning.learning_rate_gain else 1.0

    def _use(self, arrived: list[Learned]) -> None:
        """Use the results of consecutive steps, the last of them the latest."""
        self._batch_sampler.learned_all(arrived)
        for each in arrived:
            self._reporter.add(each.result)
            if each.measured:
                self._report(each.step + 1)
        now = time.perf_counter()
        if self._pace is not None and not any(each.measured for each in arrived):
            self._pace.took(arrived[-1].step + 1, (now - self._block_start) / len(arrived))
        self._block_start = now
