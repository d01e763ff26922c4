"""What connects a loop outside the cluster with the coordinator of its run; nothing here keeps the loop waiting."""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from distributed import Client
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dask_isgd import config
from dask_isgd.checks.request import ENDLESS
from dask_isgd.core import models
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import LeaseLostError, ModelError, NoLearnerWorkerError
from dask_isgd.events import Control, Scored
from dask_isgd.learner.background import LatestJobWorker
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.history_writer import HistoryWriter
from dask_isgd.learner.publisher import Publisher
from dask_isgd.learner.reporter import COLUMNS, Reporter
from dask_isgd.learner.step import Step
from dask_isgd.learner.weight_reader import WeightReader
from dask_isgd.runtime import pubsub
from dask_isgd.runtime.announcer import Announcer
from dask_isgd.runtime.client_sender import ClientSender
from dask_isgd.runtime.long_task import Parts
from dask_isgd.runtime.placement import ScorerPool

logger = logging.getLogger(__name__)

Rewritten = tuple[int, NDArray[np.float32], int]
"""A chunk, its weights, and the version that they were computed at."""
_HISTORY_ROWS = 1024
"""Rows per group of the history; more of them are in further groups."""


class ClusterLink:
    """The learner's side of a run, for a loop that is a client: its lease, its versions, its history, its weights.

    ``signature``: the parameters of the run's model. ``step``: where the loop begins.
    """

    def __init__(self, client: Client, spec: RunSpec, signature: Mapping[str, Any], step: int) -> None:
        self._client, self._spec, self._timeout = client, spec, config.seconds("cluster.timeout")
        self._signature = signature
        self.step = step
        """The latest step."""
        self._random = random.Random()  # not that of the loop, which may be seeded
        self.stopped = False
        """Whether scoring has ended, because a user asked for it."""
        self._published: int | None = None
        self._offered = -math.inf
        """When the latest version was offered."""
        self._silent = False
        """Whether that has taken too long, and was logged."""
        self._began_at: int | None = None
        """The first step that this loop made."""
        self._reported = step
        self._losses: list[Any] = []
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        self._warned: set[str] = set()
        self._reporter: Reporter | None = None
        self._history: HistoryWriter | None = None
        self._parts = Parts()

    def open(self) -> None:
        """Acquire the run's lease, subscribe to its events and start the threads."""
        spec, directory, client = self._spec, self._spec.directory, self._client
        with Parts() as parts:
            self._events = parts.add(pubsub.subscribe(client, spec.topic))
            owner = {"key": "loop", "address": "", "host": socket.gethostname(), "pid": os.getpid()}
            lease = directory.acquire_lease("learner", owner)
            sender = ClientSender(client, self._timeout, on_tick=lambda: self.announcer.heartbeat())
            self.announcer = Announcer(sender, spec.run, "learner", spec.attempt, lease.incarnation)
            parts.open(sender)
            self.weights = directory.open_weights()
            self._reader = parts.open(WeightReader(self.weights, self._timeout, strict=False))
            self._pool = ScorerPool(client, spec.scoring)
            self._publisher = parts.open(
                Publisher(
                    client,
                    spec.variable,
                    self.announcer,
                    lease,
                    dtype=spec.learning.publish_dtype,
                    timeout=self._timeout,
                    lossy=True,
                    holder=self._holder,
                )
            )
            self._background = parts.open(LatestJobWorker("history", self._timeout))
            self._lease = lease
            self._parts = parts.pop_all()

    def _holder(self) -> str:
        addresses = self._pool.addresses()
        if not addresses:
            raise NoLearnerWorkerError("the cluster has no worker to hold the parameters")
        return self._random.choice(addresses)

    # Weights

    def everything(self) -> list[Rewritten]:
        """Return all chunks that were scored so far."""
        versions, everything = self.weights.read_stamps()[:, 0], self.weights.read_all()
        chunks = np.flatnonzero(np.isfinite(versions)).tolist()
        found = ((chunk, everything[slice(*self.weights.bounds(chunk))], int(versions[chunk])) for chunk in chunks)
        return [each for each in found if not np.isnan(each[1]).all()]

    def rewritten(self) -> list[Rewritten]:
        """Return the chunks that were rewritten, and read here, since the last call."""
        found: list[Rewritten] = []
        try:
            for event in self._events.drain():
                if isinstance(event, Scored):
                    for chunk, _, version in event.chunks:
                        self._reader.request(chunk, version)
                elif isinstance(event, Control) and event.attempt == self._spec.attempt and event.want == "stop":
                    self.stopped = True
                    self.announcer.ended("stopped", self.step)  # of scoring; the loop continues
        except Exception as error:  # the client is closed
            self._warn("events of the run cannot be received", error)
        while True:
            try:
                each = self._reader.get()
            except Exception as error:
                self._warn("weights cannot be read, and stay as they are until they are scored again", error)
                continue
            if each is None:
                return found
            found.append(each)

    def _warn(self, what: str, error: Exception) -> None:
        """Log a fault that the loop survives: once of each kind."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("run %s: %s: %s", self._spec.name, what, error)

    # Versions and reports

    def advance(self, model: nn.Module, step: int, loss: Any, batch_sampler: BatchSampler, batch_size: int) -> None:
        """Publish the parameters after ``step`` and report, if either is due.

        Raises LeaseLostError, and ModelError for parameters that are not those of the run's model.
        """
        if self._began_at is None:
            self._began_at = self._reported = step
        self.step = step
        if self.stopped:
            return
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        self._publish_if_due(model)
        every = self._spec.learning.report_every
        if step // every > self._reported // every:
            self._reported = step
            self._report(batch_sampler, batch_size)

    def _publish_if_due(self, model: nn.Module) -> None:
        every, last = self._spec.learning.publish_every, self._published
        if last is not None and self.step // every <= last // every:
            return
        if not self._publisher.is_ready():
            if last is not None and not self._silent and time.monotonic() - self._offered > self._timeout:
                self._silent = True
                logger.warning(
                    "run %s: the cluster has not taken version %d within %g s, and scores get older",
                    *(self._spec.name, last, self._timeout),
                )
            return
        module = unwrapped(model)
        if last is None:
            self._require_same(module)
        self._published, self._offered, self._silent = self.step, time.monotonic(), False
        self._publisher.offer(module, self.step)

    def _require_same(self, module: nn.Module) -> None:
        wanted, found = self._signature, models.signature(module)
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if wrong:
            raise ModelError(
                f"publish: got a model of other parameters than the run's: {', '.join(wrong[:5])}; wanted the model "
                "that was given to Scorers, not a part or a sharded copy of it"
            )

    def _report(self, batch_sampler: BatchSampler, batch_size: int) -> None:
        if self._reporter is None:
            self._earlier_seconds = self._seconds_before(self._began_at or 0)
            steps = self._spec.learning.steps
            self._reporter = Reporter(
                self.announcer, self._write, steps=None if steps == ENDLESS else steps, batch_size=batch_size
            )
        for loss in self._losses:
            self._reporter.add(Step(float(loss), None, math.nan, math.nan, False))
        self._losses = []
        self._reporter.report(
            self.step,
            batch_sampler,
            seconds=self._earlier_seconds + time.monotonic() - self._began,
            learning_rate=math.nan,
            threads=torch.get_num_threads(),
        )

    def _write(self, row: dict[str, float], *, write: bool) -> None:
        try:
            if self._history is None:
                self._history = self._parts.add(self._create_history(self._began_at or 0))
            self._history.report(row, write=write)
        except LeaseLostError:
            raise
        except Exception as error:
            self._warn("the history cannot be written", error)

    def _is_held(self) -> bool:
        try:
            return self._lease.held()
        except OSError:  # a store that does not reply
            return True

    def _seconds_before(self, step: int) -> float:
        """Return how many seconds the loop had taken, in all incarnations, before ``step``."""
        try:
            history = self._spec.directory.read_history()
        except Exception as error:
            self._warn("the earlier history cannot be read, and its seconds are not counted", error)
            return 0.0
        earlier = history.sel(report=history.step < step)
        return float(earlier.seconds[-1]) if earlier.sizes["report"] else 0.0

    def _create_history(self, start: int) -> HistoryWriter:
        incarnation = self._lease.incarnation
        attributes = {"incarnation": incarnation, "start_step": start}
        name = f"learner-{incarnation:04d}"
        history = self._spec.directory.create_history(name, COLUMNS, _HISTORY_ROWS, attrs=attributes)
        return HistoryWriter(history, self._lease, self._background)

    def close(self, outcome: str, message: str = "") -> None:
        """Announce how the loop ended, and end the threads, each within ``isgd.cluster.timeout``."""
        self._publisher.close()  # a version that is on its way would bring back what the end removes
        if not self._is_held():
            outcome = "fenced"  # a successor's coordinator receives what is announced here
        if outcome == "finished":  # the coordinator waits for a last version, which has been published
            self.announcer.published(self._published or 0, checkpoint=None, final=True)
        self.announcer.ended(outcome, self.step, message)
        self._parts.close()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
