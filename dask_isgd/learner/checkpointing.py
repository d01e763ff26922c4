"""What outlives an incarnation of the learner: its checkpoints and the rows of its history."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dask_isgd.core import models
from dask_isgd.core.spec import RunSpec
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.departure import _GRACE, DepartureWatcher
from dask_isgd.learner.snapshots import Snapshots
from dask_isgd.learner.trainer import Trainer

logger = logging.getLogger(__name__)
_PAUSE, _MOST_PAUSE = 50.0, 10.0
"""What a write of the history took, so many times, and at most so many seconds pass before the next one.

A write is one of each column: it holds up the learner's interpreter, and in a store each is a request to be paid for.
"""


class Boundary(NamedTuple):
    """Everything a learner goes on from, as it was before the first step of a round."""

    step: int
    tensors: dict[str, Any]
    state: dict[str, Any]


class Checkpointer:
    """Takes up the run where the newest checkpoint left it, and commits the next ones.

    Made after the lease was taken: whatever an older incarnation commits later is not gone on from.
    In synchronous mode the start of the current round is committed, so that a resumed run scores and
    draws what the uninterrupted one does.
    """

    def __init__(
        self,
        spec: RunSpec,
        owner: Mapping[str, Any],
        trainer: Trainer,
        drawing: BatchSampler,
        *,
        columns: Sequence[str],
        timeout: float,
        leaves: Callable[[], bool],
    ) -> None:
        self.spec, self._trainer, self._drawing = spec, trainer, drawing
        directory = spec.directory
        leases = directory.leases("learner")
        leases.await_leaving(min(timeout, _GRACE))
        self.lease = leases.acquire({**owner, "host": socket.gethostname(), "pid": os.getpid()})
        self.incarnation = self.lease.incarnation
        self._checkpoints = directory.checkpoints()
        self.step = 0
        """The step gone on from."""
        self.finished = False
        """Whether there is nothing left to do."""
        self.newest: str | None = None
        """Name of the newest checkpoint."""
        self._seconds = 0.0
        self._restore()
        self._began = self._committed = time.monotonic()
        self._committed_step = self.step
        self.boundary: Boundary | None = None
        self._snapshots = Snapshots()
        self._committer = LatestJobWorker("checkpoint", timeout)
        self.history = directory.create_history(
            f"learner-{self.incarnation:04d}",
            columns,
            (spec.learning.steps - self.step) // spec.learning.report_every + 1,
            attrs={"incarnation": self.incarnation, "start_step": self.step},
        )
        self._write_from = self._began
        self._lookout = DepartureWatcher(leaves, self.lease.leaving)
        self._lookout.start()

    def _restore(self) -> None:
        found = self._checkpoints.latest()
        if found is None:
            return
        tensors = models.from_arrays(found.tensors, found.state["dtypes"])
        self._trainer.restore(tensors, found.state["trainer"])
        self._drawing.restore(found.state["drawing"])
        self.step, self._seconds, self.newest = found.step, float(found.state["seconds"]), found.name
        self.finished = bool(found.state["finished"]) and found.step >= self.spec.learning.steps

    def seconds(self) -> float:
        """Seconds this run has been trained for, by all incarnations."""
        return self._seconds + time.monotonic() - self._began

    def check(self) -> None:
        """Raise LeaseLostError if a younger incarnation holds the run."""
        self.lease.check()

    def bound(self, step: int) -> None:
        """A round begins at ``step``."""
        self.boundary = Boundary(step, self._snapshots.take(self._trainer.tensors()), self._state())

    def leave(self, step: int) -> None:
        """Commit the last step of a learner that is to go; its successor waits for it."""
        try:
            self._lookout.say()
            self.commit_now(step)
        finally:
            self._lookout.close()

    def commit_if_due(self, step: int) -> None:
        """Commit in the background once the sooner of ``checkpoint_steps`` and ``checkpoint_seconds`` is over."""
        learning = self.spec.learning
        due = time.monotonic() - self._committed >= learning.checkpoint_seconds
        if learning.checkpoint_steps is not None:
            due = due or step - self._committed_step >= learning.checkpoint_steps
        if not due or self._committer.busy:
            return
        what = self.boundary or Boundary(step, self._snapshots.take(self._trainer.tensors()), self._state())
        if what.step > self._committed_step:
            self._committed, self._committed_step = time.monotonic(), what.step
            self._committer.offer(lambda: self._commit(what))

    def commit_now(self, step: int, *, finished: bool = False) -> None:
        """Commit and wait for it, unless this very step was committed already."""
        self._committer.finish()
        self.check()
        what = self.boundary or Boundary(step, self._trainer.tensors(), self._state(finished=finished))
        if what.step > self._committed_step or finished:
            self._commit(what)
            self._committed, self._committed_step = time.monotonic(), what.step
        self.history.flush()

    def _commit(self, what: Boundary) -> None:
        self.check()
        arrays, odd = models.to_arrays(what.tensors)
        self.history.flush()  # first: what a checkpoint goes on from has its rows, wherever a kill falls
        self.newest = self._checkpoints.commit(what.step, self.incarnation, arrays, {**what.state, "dtypes": odd})

    def report(self, row: Mapping[str, float], *, write: bool) -> None:
        """One row of the history; ``write`` puts those that wait on disk, in the background."""
        self.history.append(row)
        if write and time.monotonic() >= self._write_from and not self._committer.busy:  # a checkpoint writes them too
            self._committer.offer(self._write)

    def _write(self) -> None:
        began = time.monotonic()
        self.history.flush()
        ended = time.monotonic()
        self._write_from = ended + min(_PAUSE * (ended - began), _MOST_PAUSE)

    def _state(self, *, finished: bool = False) -> dict[str, Any]:
        return {
            "run": self.spec.run,
            "seconds": self.seconds(),
            "seed": self.spec.learning.seed,
            "trainer": self._trainer.state(),
            "drawing": self._drawing.state(),
            "finished": finished,
        }

    def close(self) -> None:
        try:
            self._committer.close()
            self.history.flush()  # of a run that failed the last rows say most
        finally:
            self._lookout.close()
