"""Which rows are held for the minibatches drawn ahead, and which chunk has to be read next: no I/O.

Shapes: L minibatches are drawn ahead, of B draws each; R slots hold one drawn row each; C rows make a chunk.

Minibatches are delivered strictly in the order drawn. A chunk is read when one of its rows is needed soon, and all its
rows drawn by then are kept, so it is read again only after L steps. In that time the rows kept for it are used
up: if chunks are read at different times, about half of the rows drawn are held, and R = L B / 2 slots suffice.
Then N / (L B) rows are decoded per row drawn (and never more than C). If slots become scarce, rows needed soon come
first.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0.6180339887498949
_SLOTS_PER_DRAW = 0.525
"""Slots per draw of the window: half of it on average, and a margin."""


def steps_within(slots: int, batch: int) -> int:
    """Return how many minibatches can be drawn ahead with ``slots`` slots, without reading chunks twice for it."""
    return max(1, int(slots / (_SLOTS_PER_DRAW * batch)))


class RowWindow:
    """``steps`` minibatches of ``batch`` draws from chunks of ``chunk_size`` rows, with ``slots`` for rows.

    Chunks of the first ``lead`` minibatches are to be read now; their rows always find a slot.
    """

    def __init__(self, *, steps: int, batch: int, chunk_size: int, slots: int, lead: int) -> None:
        if not 1 <= lead <= steps or slots < lead * batch:
            raise ValueError(f"got {lead} of {steps} steps and {slots} slots, wanted a slot for each of their draws")
        self.steps, self.batch, self._chunk_size, self._lead = steps, batch, chunk_size, lead
        self._start = self.first = self.end = 0
        """Steps ``first`` to ``end`` (excluded) are drawn and not yet delivered."""
        self._rows = np.zeros((steps, batch), np.int64)
        self._awaited = np.full((steps, batch), -1, np.int32)
        """(L, B) the chunk whose read a draw waits for; -1: its row is held, or nothing is drawn."""
        self._slots = np.zeros((steps, batch), np.int32)
        self._free = np.arange(slots, dtype=np.int32)
        self._n_free = slots

    def restart(self, step: int) -> None:
        """Forget all draws; the next minibatch added is that of ``step``."""
        self.drop(self.first)
        self._start = self.first = self.end = step

    def add(self, rows: NDArray[np.int64]) -> None:
        """Add the draws (B,) of the next step."""
        at = self.end % self.steps
        self._rows[at] = rows
        self._awaited[at] = rows // self._chunk_size
        self.end += 1

    def drop(self, step: int) -> None:
        """Forget the draws of ``step`` and all later ones."""
        self._start = self.first
        while self.end > max(step, self.first):
            self.end -= 1
            self._vacate(self.end % self.steps)
            self._awaited[self.end % self.steps] = -1

    def next_chunk(self, excluded: Container[int]) -> int | None:
        """Return the chunk that is needed first and not ``excluded``; None if none is needed soon."""
        for step in range(self.first, min(self.first + self._lead, self.end)):
            awaited = self._awaited[step % self.steps]
            for chunk in awaited[awaited >= 0].tolist():
                if chunk not in excluded:
                    return int(chunk)
        return None

    def arrived(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return rows (k,) of a chunk that was read, and the slots (k,) to which they must be copied at once."""
        places = np.flatnonzero(self._awaited.reshape(-1) == chunk)
        ahead = (places // self.batch - self.first) % self.steps
        places = places[ahead < self._horizon(chunk)]
        if len(places) > self._n_free:
            ahead = np.sort(ahead)
            self._evict(int(np.searchsorted(ahead, self._lead)) - self._n_free)
            order = np.argsort((places // self.batch - self.first) % self.steps, kind="stable")
            places = places[order[: self._n_free]]
        kept = len(places)
        self._n_free -= kept
        slots = self._free[self._n_free : self._n_free + kept].copy()
        self._awaited.reshape(-1)[places] = -1
        self._slots.reshape(-1)[places] = slots
        return self._rows.reshape(-1)[places], slots

    def awaited(self) -> list[int]:
        """Return the chunks that the first minibatch waits for, perhaps repeatedly."""
        awaited = self._awaited[self.first % self.steps]
        found: list[int] = awaited[awaited >= 0].tolist()
        return found

    def slots(self) -> NDArray[np.int32]:
        """Return the slots (B,) of the first minibatch, in the order drawn; none of its rows may be awaited."""
        return np.asarray(self._slots[self.first % self.steps])

    def deliver(self) -> None:
        """Free the slots of the first minibatch: the next one becomes the first."""
        self._vacate(self.first % self.steps)
        self.first += 1

    def _horizon(self, chunk: int) -> float:
        """Return the steps from the first one for which rows of ``chunk`` are kept."""
        # At the start all chunks are read at once. A share of the window that differs from chunk to chunk
        # keeps their next reads apart, and with equal horizons they remain so.
        phase = self._start + chunk * _GOLDEN % 1.0 * self.steps - self.first
        return phase if phase > self._lead else self.steps

    def _evict(self, count: int) -> None:
        """Free at least ``count`` slots of the minibatches needed last; their rows have to be read again."""
        for step in range(self.end - 1, self.first + self._lead - 1, -1):
            if count <= 0:
                return
            at = step % self.steps
            count -= self._vacate(at)
            self._awaited[at] = self._rows[at] // self._chunk_size

    def _vacate(self, at: int) -> int:
        """Free the slots of one minibatch; return how many they are."""
        slots = self._slots[at][self._awaited[at] < 0]
        self._free[self._n_free : self._n_free + len(slots)] = slots
        self._n_free += len(slots)
        return len(slots)
