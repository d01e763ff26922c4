"""What the learner does beside its loop: publish versions, commit checkpoints.

Each runs in a thread of its own, so that the loop pays for a copy of the parameters and no more.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dask_isgd import wire
from dask_isgd.errors import WaitTimeout


class Background:
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
            raise WaitTimeout(f"{self._name}: not done within {self._timeout:g} s; does the store or scheduler answer?")

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


class Snapshots:
    """Copies of tensors in buffers that are used again once nobody holds them.

    Fresh memory for every publication costs more than the copy (page faults). Dask hands the very
    tensors on, so a buffer is free only when each tensor of its former copy has been dropped.
    """

    def __init__(self) -> None:
        self._pool: list[tuple[dict[str, Tensor], list[weakref.ref[Tensor]]]] = []

    def take(self, tensors: Mapping[str, Tensor], dtype: str | None = None) -> dict[str, Tensor]:
        """A plain dict of contiguous copies on the host, floats as ``dtype`` if given, packed for Dask (``wire``)."""
        kind = {name: (t.shape, wire.dtype_of(t, dtype)) for name, t in tensors.items()}
        for index, (buffers, held) in enumerate(self._pool):
            same = kind == {name: (b.shape, b.dtype) for name, b in buffers.items()}
            if same and all(ref() is None for ref in held):
                del self._pool[index]
                break
        else:
            buffers = {name: torch.empty(shape, dtype=of, device="cpu") for name, (shape, of) in kind.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                buffers[name].copy_(tensor)
        # views, so that their end can be seen while the buffers live on
        views = wire.pack(buffers)
        self._pool.append((buffers, [weakref.ref(view) for view in views.values()]))
        del self._pool[:-4]
        return views
