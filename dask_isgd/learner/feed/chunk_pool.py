"""A bounded pool of decoded chunks, for data that fits neither memory nor disk.

A chunk c is loaded with probability P_c = Σ q of its rows, the proposal in force at that moment. A
draw picks a slot of the pool uniformly, then a row of it with the share w/W_c of its weight; its coefficient is
1/(N · P_c · w/W_c). Over loading and drawing the expectation is

    Σ_c P_c Σ_i (w_i/W_c) · g_i / (N P_c w_i/W_c) = (1/N) Σ_i g_i,

whatever the shares are, so they may be older or younger than P_c. This is the marginal: draws of
neighbouring steps come from the same slots and depend on one another, as an epoch's minibatches do.

Which slot is emptied must not depend on its content, or chunks would be weighted by how long they
stay: slots are refilled in a circle, one for every ``reuse`` times its rows that were drawn. A draw
waits for a refill that is due: how many chunks were swapped at a step never depends on a clock.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from dask_isgd.errors import DataError
from dask_isgd.learner.feed.source import DrawSource, RowRange
from dask_isgd.sampling import Draw
from dask_isgd.storage import Dataset, Rows

LEAST_SLOTS = 4
_REUSE = 4.0
_FIRST_SLOTS = 16
"""Slots filled before the first draw; the others are filled while training."""
_EDGE_BYTES = 16
"""Bytes per row for its edge and its probability."""


def slots_within(dataset: Dataset, memory: int) -> int:
    """Return how many chunks a pool of ``memory`` bytes keeps, beside those being loaded."""
    chunk = _chunk_bytes(dataset)
    # Each chunk being loaded exists decoded, and once more encoded.
    return max(0, (memory - 2 * _ahead(dataset) * chunk) // (chunk + _EDGE_BYTES * dataset.chunk_size))


class ChunkPool:
    """A source that draws from resident chunks, which threads replace one after another.

    ``seed`` makes loads and draws reproducible given the weights. ``reuse`` is how often a loaded row is
    drawn on average before its chunk is replaced.
    """

    in_memory = False

    def __init__(
        self, dataset: Dataset, draws: DrawSource, reason: str, *, memory: int, seed: int = 0, reuse: float = _REUSE
    ) -> None:
        self.reason = reason
        self._dataset, self._draws, self._reuse = dataset, draws, reuse
        self._generator = np.random.default_rng((seed, 0x706F6F6C))
        self.slots = slots_within(dataset, memory)
        if self.slots < 1:
            raise ValueError(f"pool: {memory} bytes cannot hold a chunk of {_chunk_bytes(dataset)} bytes")
        self._rows_a_slot = dataset.chunk_size
        self._slab = [
            np.empty((self.slots, self._rows_a_slot, *array.shape[1:]), array.dtype.newbyteorder("="))
            for array in dataset.arrays.values()
        ]
        self._edges = np.empty((self.slots, self._rows_a_slot))
        self._runs: list[RowRange | None] = [None] * self.slots
        self._starts = np.zeros(self.slots, np.int64)
        self._masses = np.zeros(self.slots)
        """(slots,) P_c: a row's share times this is its q."""
        self._counts = np.zeros(self.slots)
        self._filled = self._next = self._renewed = 0
        self.loaded = 0
        """Chunks loaded so far."""
        self._drawn = self._due = 0.0
        self._readers = ThreadPoolExecutor(_ahead(dataset), thread_name_prefix="isgd-pool")
        self._pending: deque[tuple[RowRange, Future[Rows]]] = deque()
        while len(self._pending) < _ahead(dataset):
            self._request()

    def minibatch(self, step: int) -> tuple[Draw, Rows]:
        """Return a minibatch of resident rows; which rows depends on the previous steps, not on ``step``."""
        self._refill()
        positions = self._draws.positions(step, self._generator)
        self._drawn += len(positions)
        spread = positions * self._filled
        slots = np.minimum(spread.astype(np.int64), self._filled - 1)
        # Within its slot a position is uniform again.
        wanted = np.minimum(spread, np.nextafter(slots + 1.0, 0.0))
        edges = self._edges[: self._filled].reshape(-1)
        picked = np.searchsorted(edges, wanted, side="right")
        rows = picked - slots * self._rows_a_slot
        shares = edges[picked] - np.where(rows > 0, edges[picked - 1], slots)
        q = self._masses[slots] * shares
        draw = Draw(self._starts[slots] + rows, 1.0 / (self._counts[slots] * q), q)
        taken = [slab.reshape(-1, *slab.shape[2:]).take(picked, axis=0) for slab in self._slab]
        return draw, Rows(tuple(taken[:-1]), taken[-1])

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _refill(self) -> None:
        while self._filled < self.slots:
            if self._filled >= min(_FIRST_SLOTS, self.slots) and not self._pending[0][1].done():
                break
            self._swap()
        else:
            while self._drawn >= self._due:
                self._swap()
        self._renew()

    def _request(self) -> None:
        run = self._draws.run(self._rows_a_slot, self._generator)
        self._pending.append((run, self._readers.submit(self._dataset.chunk, run.start // self._rows_a_slot)))

    def _swap(self) -> None:
        """Put the next chunk into the oldest slot, and request another."""
        run, pending = self._pending[0]
        try:
            rows = pending.result()  # an error stays first in line: the next draw meets it again
        except DataError as error:
            self._draws.unreadable(error)
            self._pending.popleft()
            self._request()
            return
        self._pending.popleft()
        slot, count = self._next, len(run.probabilities)
        for slab, values in zip(self._slab, (*rows.inputs, rows.target), strict=True):
            slab[slot, :count] = values
        self._runs[slot], self._starts[slot] = run, run.start
        self._masses[slot], self._counts[slot] = run.probabilities.sum(), run.examples
        self._share(slot, run.probabilities)
        # Independent of the rows in this chunk: a short last chunk would be replaced sooner, and so count for less.
        due = self._drawn if self._filled < self.slots else self._due
        self._due = due + self._reuse * self._rows_a_slot
        self._filled = max(self._filled, slot + 1)
        self._next = (slot + 1) % self.slots
        self.loaded += 1
        self._request()

    def _share(self, slot: int, weights: NDArray[np.float64]) -> None:
        """Set the row shares of a slot as edges from ``slot`` to ``slot + 1``; rows past a short chunk's end get 0."""
        total = weights.sum()
        if not total > 0:  # all its rows were dropped after loading: the shares it was loaded with remain valid
            return
        edges = np.minimum(np.cumsum(weights) / total, 1.0)
        edges[-1] = 1.0
        self._edges[slot, : len(edges)] = slot + edges
        self._edges[slot, len(edges) :] = slot + 1.0

    def _renew(self) -> None:
        """Update one slot's shares to the current weights, in a circle: norms change while chunks stay."""
        self._renewed = (self._renewed + 1) % self._filled
        run = self._runs[self._renewed]
        assert run is not None
        self._share(self._renewed, self._draws.probabilities(run.start + np.arange(len(run.probabilities))))


def _chunk_bytes(dataset: Dataset) -> int:
    return max(1, dataset.nbytes * dataset.chunk_size // max(1, dataset.length))


def _ahead(dataset: Dataset) -> int:
    """Return how many chunks are loaded at a time: one from a disk, several over a network."""
    return 1 if dataset.local else 4
