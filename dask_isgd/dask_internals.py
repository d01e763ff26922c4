"""The private parts of Dask that have no public equivalent, each with its reason.

A canary test (``tests/test_dask_internals.py``) fails when a release of distributed moves one.
"""

from __future__ import annotations

from dask.typing import Key
from distributed import Worker
from distributed.core import Status


def task_is_wanted(worker: Worker, key: Key) -> bool:
    """Whether the cluster still wants the task that runs under ``key`` on ``worker``.

    Nothing interrupts the thread of a Dask task: after a cancel, the death of its client, a
    retirement or the end of the worker's lifetime it runs on. The state of the worker and of the
    task flips within 0.02 s, and no public API tells a task so. Read without the event loop's
    lock: two attribute look-ups and a dict look-up, each atomic.
    """
    if worker.status is not Status.running:
        return False
    task = worker.state.tasks.get(key)
    return task is not None and task.state in ("executing", "long-running")
