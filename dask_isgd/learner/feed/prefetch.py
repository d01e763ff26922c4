"""Minibatches on the learner's device, prepared ahead if preparing them takes time."""

from __future__ import annotations

import queue
import threading
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dask_isgd.core.batch import Array, Prepare, as_tensor
from dask_isgd.core.incomplete import incomplete, replaced
from dask_isgd.errors import WaitTimeoutError
from dask_isgd.learner.feed.source import Source
from dask_isgd.sampling import Draw


class Minibatch(NamedTuple):
    """B examples with the coefficients of the draw that chose them."""

    step: int
    draw: Draw
    inputs: tuple[Tensor, ...]
    targets: Tensor


class Feed:
    """Draws, gathers and prepares whole minibatches, up to ``ahead`` of them before they are asked for.

    The source draws; it is used by one thread at a time. A minibatch keeps the coefficients it was
    drawn with, however long it waited. On a CUDA device rows go through pinned memory, so that their
    copy is asynchronous. With ``skip_incomplete``, rows with missing values get the coefficient 0: they contribute
    nothing. Closing the feed closes the source.
    """

    def __init__(
        self, source: Source, prepare: Prepare, *, ahead: int, timeout: float, skip_incomplete: bool = False
    ) -> None:
        self._source, self._prepare, self._skip_incomplete = source, prepare, skip_incomplete
        self._ahead, self._timeout = ahead, timeout
        self._pin = prepare.device.type == "cuda"
        self._thread: threading.Thread | None = None
        self._ready: queue.Queue[Minibatch | BaseException] = queue.Queue(maxsize=max(1, ahead))
        self._stop = threading.Event()

    @property
    def reason(self) -> str:
        """Which source was chosen, and for what reason."""
        return self._source.reason

    @property
    def lookahead(self) -> int:
        """Steps beyond the one that is asked for whose minibatches are drawn already, at most."""
        return self._source.lookahead + (self._ahead + 1 if self._ahead else 0)

    def _make(self, step: int, until: int) -> Minibatch:
        draw, rows = self._source.minibatch(step, until)
        if self._skip_incomplete and (bad := incomplete(rows)).any():
            rows = replaced(rows, bad)
            draw = draw._replace(coefficients=np.where(bad, 0.0, draw.coefficients))
        inputs, target = rows
        if self._pin:
            x, y = self._prepare(tuple(map(_pinned, inputs)), _pinned(target))
        else:
            x, y = self._prepare(inputs, target)
        return Minibatch(step, draw, x, y)

    def __call__(self, step: int, until: int) -> Minibatch:
        """Return the minibatch of ``step``; nothing is drawn ahead for ``until`` or later.

        Raises whatever drawing or reading raised, at the step it happened for; WaitTimeoutError.
        """
        if self._ahead == 0:
            return self._make(step, until)
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, args=(step, until), name="isgd-feed", daemon=True)
            self._thread.start()
        item = self._next(step)
        if isinstance(item, BaseException):
            self._thread = None
            raise item
        if item.step == until - 1:
            self._thread.join(self._timeout)
            self._thread = None
        return item

    def _next(self, step: int) -> Minibatch | BaseException:
        while True:
            read = self._source.chunks_read
            try:
                return self._ready.get(timeout=self._timeout)
            except queue.Empty:
                if self._source.chunks_read == read:
                    raise WaitTimeoutError(
                        f"step {step}: no minibatch within {self._timeout:g} s; is the data's store slow?"
                    ) from None

    def _work(self, first: int, until: int) -> None:
        try:
            for step in range(first, until):
                self._put(self._make(step, until))
                if self._stop.is_set():
                    return
        except BaseException as error:  # passed to the learner, which raises it
            self._put(error)

    def _put(self, item: Minibatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """Stop drawing ahead, and close the source."""
        self._stop.set()
        self._source.interrupt()
        if self._thread is not None:
            self._thread.join(self._timeout)
            self._thread = None
        self._source.close()


def _pinned(rows: Array) -> Tensor:
    # Torch keeps a block that it pinned itself until the copy from it is done.
    return as_tensor(rows).pin_memory()
