"""What outlives an incarnation of the learner: its checkpoints and the rows of its history."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from dask_isgd import config
from dask_isgd.core import models
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import RunMismatchError
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.departure import GRACE, DepartureWatcher
from dask_isgd.learner.history_writer import HistoryWriter
from dask_isgd.learner.snapshots import Snapshots
from dask_isgd.learner.trainer import Trainer
from dask_isgd.storage import History
from dask_isgd.storage.run.leases import Lease

logger = logging.getLogger(__name__)
_FEEDBACK = "feedback."
"""Prefix of the weights of a run in which nothing was scored."""
_REQUESTS = 12
"""Requests of a store that a commit makes at most, with its checks of the lease and the removal of old checkpoints."""


class TrainingState(NamedTuple):
    """Everything that a learner resumes from, before it takes ``step``."""

    step: int
    tensors: dict[str, Any]
    state: dict[str, Any]


def require_steps(made: int, wanted: int) -> None:
    """Raise RunMismatchError if a run has already made more steps than it is to make."""
    if made > wanted:
        raise RunMismatchError(
            f"Learning.steps: got {wanted:,}, and the run has made {made:,} steps already; wanted at least as many. "
            "Pass more steps, or start a new run in another directory"
        )


class Checkpointer:
    """Resumes the run from its latest checkpoint, and commits the next ones.

    ``open`` acquires the lease before it reads the checkpoint, so nothing that an older incarnation commits
    later is resumed from. In synchronous mode the start of the current round is committed, so that a
    resumed run scores and draws what the uninterrupted one does. ``is_leaving``: whether the worker leaves.
    """

    lease: Lease
    history: History

    def __init__(
        self,
        spec: RunSpec,
        owner: Mapping[str, Any],
        trainer: Trainer,
        batch_sampler: BatchSampler,
        *,
        columns: Sequence[str],
        timeout: float,
        is_leaving: Callable[[], bool],
    ) -> None:
        self._spec, self._trainer, self._batch_sampler = spec, trainer, batch_sampler
        self._owner, self._columns, self._timeout = owner, columns, timeout
        self._checkpoints = spec.directory.checkpoints()
        self.step = 0
        """The step resumed from."""
        self.finished = False
        """Whether there is nothing left to do."""
        self.latest: str | None = None
        """The name of the latest checkpoint."""
        self.round_start: TrainingState | None = None
        """The start of the current round, in synchronous mode."""
        self._snapshots = Snapshots()
        self._committer = LatestJobWorker("checkpoint", _REQUESTS * config.seconds("storage.timeout"))
        self._departure = DepartureWatcher(is_leaving, lambda: self.lease.leaving())
        self._parts = ExitStack()
        self._earlier_seconds = self._began = self._committed = 0.0
        self._committed_step = 0

    def open(self) -> Self:
        """Acquire the lease, resume from the latest checkpoint and start the threads."""
        directory, learning = self._spec.directory, self._spec.learning
        leases = directory.leases("learner")
        leases.await_leaving(min(self._timeout, GRACE))
        owner = {**self._owner, "host": socket.gethostname(), "pid": os.getpid()}
        self.lease = directory.acquire_lease("learner", owner)
        incarnation = self.lease.incarnation
        self._restore()
        self._began = self._committed = time.monotonic()
        self._committed_step = self.step
        self.history = directory.create_history(
            f"learner-{incarnation:04d}",
            self._columns,
            (learning.steps - self.step) // learning.report_every + 1,
            attrs={"incarnation": incarnation, "start_step": self.step},
        )
        self._history_writer = HistoryWriter(self.history, self.lease, self._committer)
        with ExitStack() as parts:
            parts.callback(self._departure.open().close)
            parts.callback(self._history_writer.close)  # the last rows of a run that failed are the most telling
            parts.callback(self._committer.open().close)
            self._parts = parts.pop_all()
        return self

    def _restore(self) -> None:
        found = self._checkpoints.latest(self._spec.run)
        if found is None:
            return
        require_steps(found.step, self._spec.learning.steps)
        tensors = models.from_arrays(found.tensors, found.state["dtypes"])
        self._trainer.restore(tensors, found.state["trainer"])
        self._batch_sampler.monitor.restore(found.state["drawing"])
        weights = {n.removeprefix(_FEEDBACK): a for n, a in found.tensors.items() if n.startswith(_FEEDBACK)}
        self._batch_sampler.restore_feedback({**weights, **found.state.get("feedback", {})})
        self.step, self._earlier_seconds, self.latest = found.step, float(found.state["seconds"]), found.name
        self.finished = bool(found.state["finished"]) and found.step >= self._spec.learning.steps

    def seconds(self) -> float:
        """Return how many seconds this run has been trained for, by all incarnations."""
        return self._earlier_seconds + time.monotonic() - self._began

    def start_round(self, step: int) -> None:
        """Take a snapshot of the start of a round at ``step``."""
        self.round_start = self._snapshot(step)

    def _snapshot(self, step: int) -> TrainingState:
        state = self._now(step)
        return state._replace(tensors=self._snapshots.take(state.tensors))

    def leave(self, step: int) -> None:
        """Commit the last step of a learner that leaves; its successor waits for it."""
        try:
            self._departure.announce()
            self.commit_now(step)
        finally:
            self._departure.close()

    def is_due(self, step: int) -> bool:
        """Whether ``checkpoint_steps`` or ``checkpoint_seconds`` have passed, and no commit is under way."""
        learning = self._spec.learning
        due = time.monotonic() - self._committed >= learning.checkpoint_seconds
        if learning.checkpoint_steps is not None:
            due = due or step - self._committed_step >= learning.checkpoint_steps
        return due and not self._committer.busy

    def commit_soon(self, step: int) -> None:
        """Commit in the background."""
        state = self.round_start or self._snapshot(step)
        if state.step > self._committed_step:
            self._committed, self._committed_step = time.monotonic(), state.step
            self._committer.offer(lambda: self._commit(state))

    def commit_now(self, step: int, *, finished: bool = False) -> None:
        """Commit and wait for it, unless this very step was committed already."""
        self._committer.finish()
        self.lease.check()
        state = self.round_start or self._now(step, finished=finished)
        if state.step > self._committed_step or finished:
            self._commit(state)
            self._committed, self._committed_step = time.monotonic(), state.step
        self.history.flush()

    def _commit(self, state: TrainingState) -> None:
        self.lease.check()
        arrays, dtypes = models.to_arrays(state.tensors)
        self.history.flush()  # first, so that every checkpoint has its rows whenever the process is killed
        content = {**state.state, "dtypes": dtypes}
        self.latest = self._checkpoints.commit(state.step, self.lease.incarnation, arrays, content)

    def report(self, row: Mapping[str, float], *, write: bool) -> None:
        """Append a row to the history; with ``write``, write the rows that wait in the background."""
        self._history_writer.report(row, write=write)

    def _now(self, step: int, *, finished: bool = False) -> TrainingState:
        weights = self._batch_sampler.feedback_state()
        arrays = {name: value for name, value in weights.items() if isinstance(value, np.ndarray)}
        tensors = self._trainer.tensors() | {f"{_FEEDBACK}{n}": torch.from_numpy(a) for n, a in arrays.items()}
        state = {
            "run": self._spec.run,
            "seconds": self.seconds(),
            "seed": self._spec.learning.seed,
            "trainer": self._trainer.state(),
            "drawing": self._batch_sampler.monitor.state(),
            "feedback": {name: value for name, value in weights.items() if name not in arrays},
            "finished": finished,
        }
        return TrainingState(step, tensors, state)

    def close(self) -> None:
        """End the threads, write the last rows of the history and announce a departure as complete."""
        self._parts.close()
