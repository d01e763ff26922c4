"""A rank above 0 of a group: a Dask task, pinned to one worker, that lives as long as one incarnation of the group.

It is never started again: if its worker dies or leaves, the incarnation ends and the next one has ranks of its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from contextlib import closing
from datetime import timedelta

from distributed import Worker, get_worker
from distributed.comm.addressing import get_address_host
from torch.distributed import Store  # type: ignore[attr-defined]

from dask_isgd import config
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.spec import RunSpec
from dask_isgd.learner.feed import Feed, open_feed
from dask_isgd.learner.feed.source import DrawSource
from dask_isgd.learner.gradient_sum import GroupLostError
from dask_isgd.learner.group.meeting import Meeting, attend, dissolve, form
from dask_isgd.learner.group.rank import Rank
from dask_isgd.learner.group.shared_draws import SharedDraws
from dask_isgd.learner.shares import Shares
from dask_isgd.learner.threads import learner_threads
from dask_isgd.learner.trainer import Trainer
from dask_isgd.runtime.allocator import keep_freed_memory
from dask_isgd.runtime.dask_internals import calm, memory_limit, task_status, unmetered
from dask_isgd.runtime.long_task import Parts
from dask_isgd.runtime.torch_threads import LearnerThreads

logger = logging.getLogger(__name__)

HERE, ROSTER, READY, GO = "here-{}", "roster", "ready", "go"
"""Keys of the meeting's store: a member has come; the members of each rank above 0; how many are ready; all are."""
OPENING = 10.0
"""Timeouts that a rank may take to load its data."""


@unmetered
def follow(spec: RunSpec, meeting: Meeting, member: int) -> str:
    """Train as one rank of a group until it ends; return how: ``"finished"``, ``"left"``, ``"lost"`` or ``"unused"``.

    Raises NonFiniteLossError, ModelError or DataError, which end the run.
    """
    worker = get_worker()
    key = worker.get_current_task()
    keep_freed_memory(memory_limit())
    calm(worker)
    with learner_threads(spec, worker) as threads:
        try:
            return _follow(spec, meeting, member, worker, threads)
        except GroupLostError as error:
            logger.info("run %s: this rank ends: %s", spec.name, error)
            return "lost"
        except (OSError, RuntimeError):  # whatever breaks in a worker that is going away
            if task_status(worker, key) == "wanted":
                raise
            return "left"
        finally:
            dissolve()


def open_share(spec: RunSpec, draws: DrawSource, share: slice, trainer: Trainer, worker: Worker) -> Feed:
    """Open the feed of a share of each minibatch."""
    return open_feed(
        spec.data,
        draws,
        Prepare(spec.data, trainer.device),
        dataclasses.replace(spec.learning, batch_size=share.stop - share.start),
        folder=worker.local_directory,
        timeout=config.seconds("cluster.timeout"),
    )


def _follow(spec: RunSpec, meeting: Meeting, member: int, worker: Worker, threads: LearnerThreads) -> str:
    timeout, learning = config.seconds("cluster.timeout"), spec.learning
    store = attend(meeting, timeout)
    store.set_timeout(timedelta(seconds=2 * OPENING * timeout))  # longer than rank 0 waits for the others
    if store.add(HERE.format(member), 1) != 1:  # Dask runs a task again whose worker is back under its old address
        return "unused"
    roster = [int(each) for each in json.loads(_wait_for(store, ROSTER))]
    if member not in roster:
        return "unused"
    rank, count, host = roster.index(member) + 1, len(roster) + 1, get_address_host(worker.address)
    key = worker.get_current_task()
    with Parts() as parts:
        trainer = Trainer(
            models.build(spec.model, learning.seed), spec.loss_function, learning, weighted=not spec.sampling.uniform
        )
        draws = SharedDraws(learning.batch_size, rank, count, timeout)
        feed = parts.add(open_share(spec, draws, draws.share, trainer, worker))
        parts.add(draws)
        store.add(READY, 1)
        _wait_for(store, GO)
        form(store, rank, count, trainer.device, host, timeout)
        options = {"size": learning.batch_size, "report_every": learning.report_every}
        with closing(Rank(trainer, feed, draws, Shares(), **options)) as this:
            this.agree(feed.lookahead)
            this.synchronise()
            leaving = False
            while not (stretch := this.receive()).end:
                for step in range(stretch.first, stretch.first + stretch.steps):
                    this.take(step, stretch)
                leaving = task_status(worker, key) != "wanted"
                if stretch.steps:
                    this.gather(this.results(), leaving=leaving)
                elif leaving:  # while rank 0 waits
                    break
                threads.resize(scorers_idle=False)
    return "left" if leaving else "finished"


def _wait_for(store: Store, key: str) -> bytes:
    """Return what rank 0 has set; it gives up first, and then its store ends."""
    try:
        return bytes(store.get(key))
    except RuntimeError as error:
        raise GroupLostError(f"rank 0 did not reach {key!r}: {error}") from error
