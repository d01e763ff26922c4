"""One job at a time in a thread beside the learner's loop."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Self

from dask_isgd.errors import WaitTimeoutError


class LatestJobWorker:
    """One job at a time in a thread; the latest offer replaces one that still waits.

    An error of a job is raised by the learner's next call. The thread inherits the context of the
    caller of ``open``, in which Dask's ``get_worker`` finds the worker.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        self._lock = threading.Condition()
        self._waiting: Callable[[], None] | None = None
        self._busy = False
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def open(self) -> Self:
        """Start the thread."""
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), name=self._name, daemon=True)
        self._thread.start()
        return self

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        with self._lock:
            return self._busy or self._waiting is not None

    def offer(self, job: Callable[[], None]) -> None:
        """Run ``job`` soon, instead of any job that has not begun."""
        with self._lock:
            self._raise()
            self._waiting = job
            self._lock.notify_all()

    def finish(self) -> None:
        """Wait until nothing is left to do."""
        with self._lock:
            done = self._lock.wait_for(lambda: not self._busy and self._waiting is None, self._timeout)
            self._raise()
        if not done:
            raise WaitTimeoutError(
                f"{self._name}: not done within {self._timeout:g} s; is the store or the scheduler responding?"
            )

    def close(self) -> None:
        """End the thread; a job that waits is dropped."""
        with self._lock:
            self._closed, self._waiting = True, None
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(self._timeout)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                job, self._waiting, self._busy = self._waiting, None, True
            try:
                job()
            except BaseException as error:  # raised by the learner's next call
                self._error = error
            finally:
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()
