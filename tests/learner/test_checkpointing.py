"""A learner that leaves in order is waited for, however long its steps are: on a simulated clock."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from dask_isgd.errors import LeaseLostError
from dask_isgd.learner.departure import _LOOK, DepartureWatcher
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.run import leases

GRACE = 35.0


class Clock:
    """Stands in for the module ``time``: whoever sleeps lets the others act."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def at(self, when: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._due, (when, next(self._order), act))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.now, _, act = heapq.heappop(self._due)
            act()
        self.now = until


class Leaver:
    """A learner in the middle of a long step when its worker begins to leave."""

    def __init__(self, clock: Clock, run: RunDirectory, *, leaves_at: float, step_ends_at: float, looks: bool) -> None:
        self.run, self.leases = run, run.leases()
        self.incarnation = self.leases.acquire({})
        run.checkpoints().commit(100, self.incarnation, {"a": np.zeros(1)}, {})
        self.fenced = False
        self.lookout = DepartureWatcher(lambda: clock.now >= leaves_at, lambda: self.leases.leaving(self.incarnation))
        if looks:
            for look in np.arange(0.0, step_ends_at, _LOOK):
                clock.at(float(look), self.lookout.look)
        clock.at(step_ends_at, self.leave)

    def leave(self) -> None:
        """What ``Checkpointer.leave`` does once the step is over."""
        self.lookout.say()
        try:
            self.leases.check(self.incarnation)
            self.run.checkpoints().commit(137, self.incarnation, {"a": np.ones(1)}, {})
        except LeaseLostError:
            self.fenced = True
        finally:
            self.lookout.close()


def succeed(clock: Clock, run: RunDirectory, arrives_at: float) -> int:
    """The step a successor goes on from: it waits for who leaves, takes the lease, reads the newest checkpoint."""
    clock.sleep(arrives_at)
    mine = run.leases()
    mine.await_leaving(GRACE)
    mine.acquire({})
    found = run.checkpoints().latest()
    assert found is not None
    return found.step


@pytest.mark.parametrize(
    ("step_ends_at", "looks", "goes_on_from"),
    [
        (1.02, True, 137),  # a short step
        (6.0, True, 137),  # a long one: the word is given in its middle
        (6.0, False, 100),  # nobody looks during the step: the successor fences it, and its steps are lost
        (90.0, True, 100),  # longer than the grace: its worker is gone by then
    ],
)
def test_the_successor_goes_on_from_the_last_step_of_a_learner_that_leaves(
    tmp_path, monkeypatch, step_ends_at, looks, goes_on_from
):
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    run = RunDirectory(tmp_path / "run")
    leaver = Leaver(clock, run, leaves_at=1.0, step_ends_at=step_ends_at, looks=looks)
    assert succeed(clock, run, arrives_at=1.2) == goes_on_from
    clock.sleep(100.0)
    assert leaver.fenced == (goes_on_from == 100)
    assert clock.now <= 1.2 + GRACE + _LOOK + 100.0


def test_a_learner_that_is_killed_is_not_waited_for(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    run = RunDirectory(tmp_path / "run")
    Leaver(clock, run, leaves_at=1e9, step_ends_at=1e9, looks=False)
    assert succeed(clock, run, arrives_at=1.2) == 100
    assert clock.now == 1.2


def test_the_lookout_looks_by_itself_and_gives_its_word_once(tmp_path):
    mine = RunDirectory(tmp_path / "run").leases()
    incarnation = mine.acquire({})
    lookout = DepartureWatcher(lambda: True, lambda: mine.leaving(incarnation))
    lookout.start()
    assert lookout._thread is not None
    lookout._thread.join(60)
    assert (tmp_path / "run" / "leases" / "learner-0001.leaving").exists()
    lookout.say()
    lookout.close()
    lookout.close()
    assert (tmp_path / "run" / "leases" / "learner-0001.left").exists()
