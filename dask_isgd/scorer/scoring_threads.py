"""The threads of a worker that compute, apart from those in which Dask runs tasks, so that tasks overlap.

A task reads and writes in Dask's thread and computes in one of these, of which there are as many as the worker scores
chunks at a time. Once its computation begins, it gives its place among Dask's threads to the next task, which reads
while this one is scored, and then waits; the next one is scored while this one writes::

    task 1   read │ score ─────────── │ write
    task 2        │ read ···          │ score ─────────── │ write
    task 3                            │ read ···          │ score …

A task that waits keeps its place, so that only one per thread reads ahead. Every task ends after its own write, and
raises its own errors.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

from distributed import Reschedule, Worker, get_worker, secede

from dask_isgd.runtime import torch_threads
from dask_isgd.runtime.dask_internals import calm, task_status, worker_supply
from dask_isgd.runtime.placement import SCORER, places

_T = TypeVar("_T")
_POLL = 0.1


class ScoringThreads:
    """``count`` threads; computations begin in the order in which they arrive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="isgd-scoring")

    def run(self, compute: Callable[[], _T], begun: Callable[[], None], require_wanted: Callable[[], None]) -> _T:
        """Return ``compute()``, called in one of the threads; once that has begun, call ``begun`` in this one.

        ``require_wanted`` is called until then, and just before ``compute``; an error of it is raised.
        """
        started = threading.Event()

        def job() -> _T:
            started.set()
            require_wanted()
            return compute()

        future = self._pool.submit(contextvars.copy_context().run, job)
        while not started.wait(_POLL):
            try:
                require_wanted()
            except BaseException:
                future.cancel()
                raise
        begun()
        return future.result()


_lock = threading.Lock()
_of_workers: weakref.WeakKeyDictionary[Worker, ScoringThreads] = weakref.WeakKeyDictionary()
_of_process = ScoringThreads(1)
"""For calls that are not tasks."""


def compute_in_turn(compute: Callable[[], _T], resources: Mapping[str, float] | None) -> _T:
    """Return ``compute()``, called in a scoring thread of the worker that runs this task.

    ``resources``: those of ``Scoring``, which bound how many tasks the worker scores at a time.
    Raises CancelledError if the task was cancelled before its turn, Reschedule if the worker leaves before: Dask closes
    a worker only once its tasks have ended, and soon kills it.
    """
    try:
        worker = get_worker()
    except ValueError:  # not in a task
        return _of_process.run(compute, lambda: None, lambda: None)
    key = worker.get_current_task()

    def require_wanted() -> None:
        status = task_status(worker, key)
        if status == "cancelled":  # its run may have ended, and another may write here
            raise CancelledError(f"{key} was cancelled before its turn")
        if status == "leaving":
            raise Reschedule

    return _threads_of(worker, resources).run(compute, secede, require_wanted)


def _threads_of(worker: Worker, resources: Mapping[str, float] | None) -> ScoringThreads:
    nthreads, supply = worker_supply(worker)
    wanted = resources if resources is not None else {SCORER: 1.0} if supply.get(SCORER) else {}
    # A learner keeps one of Dask's threads as long as it runs.
    count = places(max(1, nthreads - torch_threads.learners()), supply, wanted)
    with _lock:
        found = _of_workers.get(worker)
        if found is None:
            calm(worker)
        if found is None or found.count != count:
            found = _of_workers[worker] = ScoringThreads(count)
        return found
