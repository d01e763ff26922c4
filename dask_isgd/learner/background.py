"""One job at a time in a thread beside the learner's loop."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

from dask_isgd.errors import WaitTimeoutError


class LatestJobWorker:
    """One job at a time in a thread; the newest offer replaces one that still waits.

    An error of a job is raised by the next call of the learner. The thread inherits the context
    of its maker, in which Dask's ``get_worker`` finds the worker.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        self._lock = threading.Condition()
        self._waiting: Callable[[], None] | None = None
        self._busy = False
        self._error: BaseException | None = None
        self._open = True
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        with self._lock:
            return self._busy or self._waiting is not None

    def offer(self, job: Callable[[], None]) -> None:
        """Do ``job`` soon, instead of any that has not begun."""
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
                f"{self._name}: not done within {self._timeout:g} s; does the store or scheduler answer?"
            )

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        with self._lock:
            self._open, self._waiting = False, None
            self._lock.notify_all()
        self._thread.join(self._timeout)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting is not None or not self._open)
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
