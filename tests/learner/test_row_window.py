"""Promises of the window: every draw is served, in order, from slots that hold its row, with few reads."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dask_isgd.learner.feed.row_window import RowWindow, steps_within

N, CHUNK, BATCH = 4000, 40, 16


class Oracle:
    """Plays a window against the rows themselves: a slot holds a row's number."""

    def __init__(self, steps, slots, *, lead=1, seed=0, q=None):
        self.window = RowWindow(steps=steps, batch=BATCH, chunk_size=CHUNK, slots=slots, lead=lead)
        self.random, self.q = np.random.default_rng(seed), q
        self.held = np.full(slots, -1)
        self.drawn, self.reads, self.most = {}, 0, 0

    def add_until(self, until):
        while self.window.end < until:
            rows = self.random.choice(N, BATCH, p=self.q)
            self.drawn[self.window.end] = rows
            self.window.add(rows)

    def read(self, chunk):
        rows, slots = self.window.arrived(chunk)
        assert_array_equal(rows // CHUNK, chunk)
        assert len(np.unique(slots)) == len(slots)
        self.held[slots] = rows
        self.reads += 1

    def step(self, until):
        window = self.window
        self.add_until(min(until, window.first + window.steps))
        while (chunk := window.next_chunk(())) is not None:
            self.read(chunk)
        assert window.awaited() == []
        assert_array_equal(self.held[window.slots()], self.drawn[window.first])
        window.deliver()


@pytest.mark.parametrize(
    ("steps", "slots", "lead"),
    [
        (1, 16, 1),  # nothing ahead
        (40, 16, 1),  # slots for one minibatch: rows needed later are given up again and again
        (40, 100, 3),
        (40, 320, 2),  # half of the draws
        (40, 640, 40),
    ],
)
@pytest.mark.parametrize("tail", [None, 1.2], ids=["uniform", "few heavy rows"])
def test_every_minibatch_is_served_in_order(steps, slots, lead, tail):
    q = None if tail is None else np.random.default_rng(1).pareto(tail, N) + 0.1
    oracle = Oracle(steps, slots, lead=lead, q=None if q is None else q / q.sum())
    for _ in range(200):
        oracle.step(200)


def test_each_chunk_is_read_about_once_per_window():
    slots = 1600
    steps = steps_within(slots, BATCH)
    oracle = Oracle(steps, slots)
    for _ in range(2 * steps):
        oracle.step(10**9)
    before = oracle.reads
    for _ in range(10 * steps):
        oracle.step(10**9)
    # The best is N/CHUNK chunks per window: rows that arrive are on average held for half of it.
    assert (oracle.reads - before) / 10 < 1.2 * N / CHUNK


def test_dropped_draws_are_forgotten_and_their_slots_free():
    oracle = Oracle(20, 200)
    oracle.step(100)
    free = oracle.window._n_free
    oracle.window.drop(5)
    assert (oracle.window.end, oracle.window._n_free > free) == (5, True)
    for _ in range(60):
        oracle.step(100)
    oracle.window.restart(0)
    assert oracle.window._n_free == 200
    oracle.step(1)


def test_chunks_in_the_order_needed_and_nothing_beyond_the_lead():
    window = RowWindow(steps=4, batch=2, chunk_size=10, slots=8, lead=2)
    for rows in ([35, 11], [12, 77], [50, 51]):
        window.add(np.array(rows))
    assert [window.next_chunk(e) for e in ((), {3}, {3, 1}, {3, 1, 7})] == [3, 1, 7, None]


@pytest.mark.parametrize(("steps", "slots", "lead"), [(4, 7, 4), (4, 8, 0), (4, 99, 5)])
def test_impossible_sizes_are_refused(steps, slots, lead):
    with pytest.raises(ValueError, match="wanted a slot for each"):
        RowWindow(steps=steps, batch=2, chunk_size=10, slots=slots, lead=lead)
