"""Whatever is killed, retired or resumed in whatever order: nothing committed is lost, nothing old is heard again.

Learners are simulated on a clock of steps; leases, checkpoints and the rule of what is heard are the real ones.
A learner's actions fall between any two actions of another: Dask may run two at once for half a minute.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dask_isgd.errors import LeaseLostError
from dask_isgd.order import LatestVersion, sort_key
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.run.leases import Lease


@dataclass
class Learner:
    """What an incarnation holds in memory: lost when it is killed."""

    lease: Lease
    step: int
    committed: int
    alive: bool = True

    @property
    def incarnation(self) -> int:
        return self.lease.incarnation


class Listener:
    """A coordinator: takes the Variable's version when it is told to look; its successor starts from the stamps."""

    def __init__(self, floor: tuple[int, int]) -> None:
        self.newest = LatestVersion(floor)
        self.heard: list[tuple[int, int]] = []

    def look(self, variable: tuple[int, int] | None) -> None:
        if variable is not None and self.newest.accepts(variable):
            self.heard.append(variable)


class Faults(RuleBasedStateMachine):
    learners: Bundle[Learner] = Bundle("learners")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.run = RunDirectory(self.folder / "run")
        self.checkpoints = self.run.checkpoints()
        self.leases = self.run.leases()
        self.durable = 0
        """The highest step committed by the holder of the run: what a successor must go on from."""
        self.variable: tuple[int, int] | None = None
        self.listener = Listener((0, -1))
        self.stamp = (0, -1)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(target=learners)
    def start(self) -> Learner:
        """A first start, a restart by Dask while the old one may still run, or a resume."""
        lease = self.leases.acquire({})
        found = self.checkpoints.latest()
        step = found.step if found is not None else 0
        assert step == self.durable, "a committed step was lost"
        return Learner(lease, step, step)

    @rule(learner=learners, steps=st.integers(1, 40))
    def train(self, learner: Learner, steps: int) -> None:
        if learner.alive:
            learner.step += steps

    @rule(learner=learners)
    def commit(self, learner: Learner) -> None:
        if not learner.alive or learner.step <= learner.committed:
            return
        try:
            learner.lease.check()
        except LeaseLostError:
            assert learner.incarnation < self.leases.highest()
            learner.alive = False
            return
        assert learner.incarnation == self.leases.highest(), "an old learner was not fenced"
        self.checkpoints.commit(learner.step, learner.incarnation, {"a": np.array([learner.step])}, {})
        learner.committed = self.durable = learner.step

    @rule(learner=learners)
    def commit_late(self, learner: Learner) -> None:
        """The successor takes its lease and reads the newest checkpoint between the check and the rename."""
        if not learner.alive or learner.step <= learner.committed or learner.incarnation != self.leases.highest():
            return
        learner.lease.check()
        successor = self.leases.acquire({})
        found = self.checkpoints.latest()
        self.checkpoints.commit(learner.step, learner.incarnation, {"a": np.array([0])}, {})
        learner.alive = False
        # the successor commits what it went on from and one step more: it is the newest for all who come after
        step = (found.step if found is not None else 0) + 1
        self.checkpoints.commit(step, successor.incarnation, {"a": np.array([step])}, {})
        self.durable = step

    @rule(learner=learners, looked=st.booleans())
    def publish(self, learner: Learner, looked: bool) -> None:
        """The Variable is set; the announcement is heard or lost."""
        if not learner.alive:
            return
        try:
            learner.lease.check()
        except LeaseLostError:
            learner.alive = False
            return
        self.variable = (learner.incarnation, learner.step)
        if looked:
            self.listener.look(self.variable)

    @rule(learner=learners)
    def publish_late(self, learner: Learner) -> None:
        """Fenced between the check and the Variable: it holds an old version for a while."""
        if learner.alive:
            self.variable = (learner.incarnation, learner.step)

    @rule()
    def look(self) -> None:
        self.listener.look(self.variable)

    @rule()
    def stamped(self) -> None:
        """Scores of the newest version are in: its order is on disk."""
        if self.listener.heard:
            self.stamp = max(self.stamp, self.listener.heard[-1])

    @rule()
    def kill_listener(self) -> None:
        self.listener = Listener(self.stamp)

    @rule(learner=consumes(learners))
    def kill(self, learner: Learner) -> None:
        learner.alive = False

    @rule(learner=learners)
    def retire(self, learner: Learner) -> None:
        """It commits within its grace and leaves."""
        self.commit(learner)
        learner.alive = False

    @invariant()
    def what_is_heard_grows(self) -> None:
        heard = self.listener.heard
        assert heard == sorted(set(heard)), "an older incarnation or version was heard after a newer one"
        assert all(order > self.stamp or order in heard for order in heard[-1:])

    @invariant()
    def there_is_always_a_checkpoint_to_go_on_from(self) -> None:
        found = self.checkpoints.latest()
        assert (found.step if found is not None else 0) == self.durable


Faults.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestFaults = Faults.TestCase


VERSIONS = st.tuples(st.integers(0, 8999), st.integers(0, 10**12 - 1))


@given(orders=st.lists(VERSIONS, max_size=20))
def test_keys_sort_as_the_pairs_do(orders):
    keys = [sort_key(*order) for order in orders]
    assert [sort_key(*order) for order in sorted(orders)] == sorted(keys)
    assert len(set(keys)) == len(set(orders))
    stamps = np.array([*orders, (np.nan, np.nan)], float)
    np.testing.assert_array_equal(sort_key(stamps[:, 0], stamps[:, 1]), [*keys, np.nan])
