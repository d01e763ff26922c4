"""Rows of minibatches that are drawn ahead, for data that fit neither memory nor disk.

The next L minibatches are drawn by the weights of that moment, and each chunk that they need is read once for all of
them. Drawing early makes the weights up to L steps older. It adds no bias and no dependence between steps,
because what is delivered depends neither on where rows lie nor on when they arrive:

- minibatches are delivered in the order drawn, with the coefficients of their own draw;
- a drawn minibatch is dropped only if the gate has opened or closed, which depends on minibatches delivered before;
  or if a chunk cannot be read and is left out, and then all from that step on are drawn again;
- nothing is drawn beyond the step that the caller names: the end of the run, or of a synchronous round.

A resumed run draws its queue again, from the random numbers of the same steps.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError, WaitTimeoutError
from dask_isgd.learner.feed.positioned_reads import HELD_SHARE
from dask_isgd.learner.feed.row_window import RowWindow, steps_within
from dask_isgd.learner.feed.source import DrawSource
from dask_isgd.sampling import Draw
from dask_isgd.storage import Dataset, Rows

_LOCAL_READERS, _REMOTE_READERS = 2, 16
_READ_SHARE = 0.25
"""Share of the memory that chunks being read may take."""
_LOCAL_LEAD, _REMOTE_LEAD = 1 / 32, 1 / 8
"""Share of the window within which chunks are read: the longer, the more latency is hidden, and the more is read."""
_SLOT_BYTES = 80
"""Bytes per slot beside its row: about two draws, with index, coefficient, probability, slot and chunk."""


class Lookahead:
    """Draws up to ``steps`` minibatches of ``batch`` examples ahead, fewer if ``memory`` bytes hold fewer rows.

    ``prepared`` is how many minibatches the caller may take before it has trained on the first of them.
    Arrays of small rows are held in memory, in a tenth of ``memory``. A read may take ``timeout`` seconds.
    """

    in_memory = False

    def __init__(
        self,
        dataset: Dataset,
        draws: DrawSource,
        *,
        batch: int,
        steps: int,
        prepared: int,
        memory: int,
        timeout: float,
    ) -> None:
        self._dataset, self._draws, self._timeout = dataset, draws, timeout
        held: set[str] = set()
        left, row_bytes = int(HELD_SHARE * memory), 0
        for name, array in dataset.arrays.items():
            size = array.size * array.dtype.itemsize
            if size <= left:
                left, memory = left - size, memory - size
                held.add(name)
            else:
                row_bytes += size // dataset.length
        chunk_bytes = 2 * dataset.chunk_size * row_bytes  # a chunk being read exists decoded, and once more encoded
        most = _LOCAL_READERS if dataset.local else _REMOTE_READERS
        self._most_readers = max(1, min(most, int(_READ_SHARE * memory) // max(1, chunk_bytes)))
        memory -= self._most_readers * chunk_bytes
        slots = min(max(batch, memory // (row_bytes + _SLOT_BYTES)), steps * batch)
        steps = min(steps, steps_within(slots, batch))
        lead = max(1, min(int(steps * (_LOCAL_LEAD if dataset.local else _REMOTE_LEAD)), slots // batch))
        self.lookahead = steps - 1
        self._window = RowWindow(steps=steps, batch=batch, chunk_size=dataset.chunk_size, slots=slots, lead=lead)
        self._arrays: dict[str, _Slab | _ArrayInMemory] = {}
        for name, array in dataset.arrays.items():
            dtype = array.dtype.newbyteorder("=")
            if name in held:
                self._arrays[name] = _ArrayInMemory(np.empty(array.shape, dtype))
            else:
                self._arrays[name] = _Slab(np.empty((slots, *array.shape[1:]), dtype))
        self._queue: dict[int, Draw] = {}
        self._prepared, self._gate_step = prepared, draws.gate_step
        self._changed = Condition()
        self._failed: dict[int, Exception] = {}
        self._reading: set[int] = set()
        self._closed = False
        self._readers = ThreadPoolExecutor(self._most_readers, thread_name_prefix="isgd-read")
        self.chunks_read = 0
        window = steps * batch
        self.rows_per_draw = dataset.length / window * (1.0 - math.pow(1.0 - 1.0 / dataset.n_chunks, window))
        """Rows that are decoded per row drawn, if draws are uniform: each chunk that L minibatches need, once."""
        self.reason = f"rows drawn up to {steps - 1} steps ahead, about {self.rows_per_draw:.3g} decoded per row drawn"

    def minibatch(self, step: int, until: int) -> tuple[Draw, Rows]:
        attempt = 0
        with self._changed:
            self._drop_outdated(step)
            while True:
                self._draw_ahead(step, until, attempt)
                self._read_ahead()
                awaited = self._window.awaited()
                if not awaited:
                    break
                failed = next((chunk for chunk in awaited if chunk in self._failed), None)
                if failed is not None:
                    attempt += 1
                    self._handle(self._failed.pop(failed), step)
                elif self._closed or not self._changed.wait(self._timeout):
                    raise WaitTimeoutError(self._why(step, awaited))
            draw, slots = self._queue.pop(step), self._window.slots()
            taken = [array.rows(draw.indices, slots) for array in self._arrays.values()]
            self._window.deliver()
            self._read_ahead()
        return draw, Rows(tuple(taken[:-1]), taken[-1])

    def interrupt(self) -> None:
        """End a wait in ``minibatch``, in another thread, with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        self.interrupt()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _drop_outdated(self, step: int) -> None:
        """Forget what was drawn with the gate in its former state, and everything if ``step`` is not the next one."""
        if self._window.first != step:
            self._queue.clear()
            self._window.restart(step)
        gate_step = self._draws.gate_step
        if gate_step != self._gate_step:
            self._gate_step = gate_step
            # The first step that this thread cannot have begun when the gate changed, however fast it is.
            self._drop(max(step, gate_step + self._prepared + 2))

    def _drop(self, step: int) -> None:
        self._window.drop(step)
        self._queue = {s: draw for s, draw in self._queue.items() if s < step}

    def _draw_ahead(self, step: int, until: int, attempt: int) -> None:
        while (drawn := self._window.end) < max(step + 1, min(until, step + self._window.steps)):
            draw = self._draws.draw(drawn, attempt if drawn == step else 0)
            self._window.add(draw.indices)
            self._queue[drawn] = draw

    def _read_ahead(self) -> None:
        """Start to read the chunks needed first, a few at a time."""
        while len(self._reading) < self._most_readers and not self._closed:
            chunk = self._window.next_chunk(self._reading | self._failed.keys())
            if chunk is None:
                return
            self._reading.add(chunk)
            self._readers.submit(self._read, chunk)

    def _read(self, chunk: int) -> None:
        """Read a chunk, in a thread, and keep the rows drawn from it."""
        try:
            start = chunk * self._dataset.chunk_size
            found = {n: self._dataset.chunk_of_array(n, chunk) for n, a in self._arrays.items() if a.lacks(chunk)}
            with self._changed:
                rows, slots = self._window.arrived(chunk)
                for name, values in found.items():
                    self._arrays[name].put(chunk, start, values, rows - start, slots)
                self.chunks_read += 1
        except Exception as error:  # raised at the step that needs this chunk
            with self._changed:
                self._failed[chunk] = error
        with self._changed:
            self._reading.discard(chunk)
            self._read_ahead()
            self._changed.notify_all()

    def _handle(self, error: Exception, step: int) -> None:
        """Raise the error of a chunk that ``step`` needs, unless the run continues without that chunk."""
        if not isinstance(error, DataError):
            raise error
        self._draws.unreadable(error)
        self._drop(step)

    def _why(self, step: int, awaited: list[int]) -> str:
        if self._closed:
            return f"step {step}: the feed was closed"
        first, seconds = awaited[0], self._timeout
        return f"step {step}: chunk {first} was not read, and no other one within {seconds:g} s; is the store slow?"


class _Slab:
    """Rows of one array for the draws ahead, one per slot (R, ...)."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    def lacks(self, chunk: int) -> bool:
        return True

    def put(
        self, chunk: int, start: int, values: NDArray[Any], inside: NDArray[np.int64], slots: NDArray[np.int32]
    ) -> None:
        self._values[slots] = values[inside]

    def rows(self, indices: NDArray[np.int64], slots: NDArray[np.int32]) -> NDArray[Any]:
        return self._values.take(slots, axis=0)


class _ArrayInMemory:
    """A complete array of small rows (N, ...); each chunk is filled when it is first read."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values
        self._filled: set[int] = set()

    def lacks(self, chunk: int) -> bool:
        return chunk not in self._filled

    def put(
        self, chunk: int, start: int, values: NDArray[Any], inside: NDArray[np.int64], slots: NDArray[np.int32]
    ) -> None:
        self._values[start : start + len(values)] = values
        self._filled.add(chunk)

    def rows(self, indices: NDArray[np.int64], slots: NDArray[np.int32]) -> NDArray[Any]:
        return self._values.take(indices, axis=0)
