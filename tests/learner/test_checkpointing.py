"""Checkpoints: a learner that leaves in order commits its last step, and a model of any dtype resumes."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.core import models
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import LeaseLostError
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.checkpointing import Checkpointer
from dask_isgd.learner.departure import _POLL, GRACE, DepartureWatcher
from dask_isgd.learner.reporter import COLUMNS
from dask_isgd.learner.trainer import Trainer
from dask_isgd.storage import Dataset, RunDirectory, write_dataset
from dask_isgd.storage.backends.local import LocalFolder
from dask_isgd.storage.run import leases

WAIT = 120


class Clock:
    """Stands in for the module ``time``: a sleep lets the others act."""

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

    def __init__(self, clock: Clock, run: RunDirectory, *, leaves_at: float, step_ends_at: float, checks: bool) -> None:
        self.run, self.lease = run, run.leases().acquire({})
        run.checkpoints().commit(100, self.lease.incarnation, {"a": np.zeros(1)}, {})
        self.fenced = False
        self.watcher = DepartureWatcher(lambda: clock.now >= leaves_at, self.lease.leaving)
        if checks:
            for look in np.arange(0.0, step_ends_at, _POLL):
                clock.at(float(look), self.watcher.check)
        clock.at(step_ends_at, self.leave)

    def leave(self) -> None:
        """What ``Checkpointer.leave`` does once the step is over."""
        self.watcher.announce()
        try:
            self.lease.check()
            self.run.checkpoints().commit(137, self.lease.incarnation, {"a": np.ones(1)}, {})
        except LeaseLostError:
            self.fenced = True
        finally:
            self.watcher.close()


def succeed(clock: Clock, run: RunDirectory, arrives_at: float) -> int:
    """Return the step that a successor resumes from, once its predecessor has left and it has the lease."""
    clock.sleep(arrives_at)
    mine = run.leases()
    mine.await_leaving(GRACE)
    mine.acquire({})
    found = run.checkpoints().latest()
    assert found is not None
    return found.step


@pytest.mark.parametrize(
    ("step_ends_at", "checks", "resumes_from"),
    [
        (1.02, True, 137),  # a short step
        (6.0, True, 137),  # a long one: the departure is announced in its middle
        (6.0, False, 100),  # nothing checks during the step: the successor fences it, and its steps are lost
        (90.0, True, 100),  # longer than the grace: its worker is gone by then
    ],
)
def test_the_successor_resumes_from_the_last_step_of_a_learner_that_leaves(
    tmp_path, monkeypatch, step_ends_at, checks, resumes_from
):
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    run = RunDirectory(tmp_path / "run")
    leaver = Leaver(clock, run, leaves_at=1.0, step_ends_at=step_ends_at, checks=checks)
    assert succeed(clock, run, arrives_at=1.2) == resumes_from
    clock.sleep(100.0)
    assert leaver.fenced == (resumes_from == 100)
    assert clock.now <= 1.2 + GRACE + _POLL + 100.0


def test_a_learner_that_is_killed_is_not_waited_for(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    run = RunDirectory(tmp_path / "run")
    Leaver(clock, run, leaves_at=1e9, step_ends_at=1e9, checks=False)
    assert succeed(clock, run, arrives_at=1.2) == 100
    assert clock.now == 1.2


def test_the_watcher_checks_by_itself_and_announces_the_departure_once(tmp_path):
    lease = RunDirectory(tmp_path / "run").leases().acquire({})
    watcher = DepartureWatcher(lambda: True, lease.leaving).open()
    announced, deadline = tmp_path / "run" / "leases" / "learner-0001.leaving", time.monotonic() + 60
    while not announced.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert announced.exists()
    watcher.announce()
    watcher.close()
    watcher.close()
    assert (tmp_path / "run" / "leases" / "learner-0001.left").exists()


# A model whose parameters are bfloat16, which numpy does not know ---------------------------------


class ToBfloat16(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()


def bfloat16_model() -> nn.Module:
    return nn.Sequential(ToBfloat16(), nn.Linear(4, 3).bfloat16())


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Sixty-four examples of three classes."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(64, 4)).astype("f4"), random.integers(0, 3, 64)
    write_dataset(tmp_path / "data", "train", {"x": x, "y": y}, inputs="x", target="y", chunk_size=16)
    return Dataset(tmp_path / "data")


def learning(**changes) -> isgd.Learning:
    settings = {"steps": 40, "batch_size": 8, "publish_every": 10, "report_every": 10, "checkpoint_steps": 1}
    return isgd.Learning(**{**settings, "threads": 1, "momentum": 0.9, **changes})


@pytest.fixture
def spec(data: Dataset, tmp_path: Path) -> RunSpec:
    """A run of such a model, with its directory."""
    plan = prepare(RunRequest(model=bfloat16_model, data=data, run_dir=tmp_path / "run", learning=learning()))
    create(plan)
    return plan.spec


def incarnation(spec: RunSpec, timeout: float = WAIT) -> tuple[Trainer, Checkpointer]:
    """What a learner trains with, once it has resumed from the latest checkpoint."""
    trainer, _, checkpointer = parts_of(spec, timeout)
    return trainer, checkpointer


def parts_of(
    spec: RunSpec, timeout: float = WAIT, batch_sampler: BatchSampler | None = None
) -> tuple[Trainer, BatchSampler, Checkpointer]:
    trainer = Trainer(models.build(spec.model, 1), spec.loss_function, spec.learning)
    batch_sampler = batch_sampler or BatchSampler(
        spec.examples, spec.chunk, spec.learning.batch_size, spec.sampling, seed=0, report_every=20
    )
    made = Checkpointer(spec, {}, trainer, batch_sampler, columns=COLUMNS, timeout=timeout, is_leaving=lambda: False)
    return trainer, batch_sampler, made.open()


@pytest.mark.parametrize("background", [True, False])
def test_weights_that_come_from_feedback_alone_are_resumed_from(spec, background):
    """No store has them. Weights that were scored are in the weight array, not in checkpoints."""
    _, batch_sampler, checkpointer = parts_of(spec)
    rng = np.random.default_rng(0)
    for step in range(0, 30, 10):
        fed = rng.integers(64, size=8)
        batch_sampler.sampler.feedback(fed, rng.exponential(size=8), step)
    if background:
        checkpointer.commit_soon(30)
        before = batch_sampler.sampler.probabilities()
        batch_sampler.sampler.feedback([5], [1e6], 30)
        checkpointer.commit_now(30)
    else:
        before = batch_sampler.sampler.probabilities()
        checkpointer.commit_now(30)
    checkpointer.close()
    _, resumed, checkpointer = parts_of(spec)
    checkpointer.close()
    np.testing.assert_array_equal(resumed.sampler.probabilities(), before)
    assert before.max() > 1.5 / 64
    resumed.update(0, np.ones(spec.chunk, "f4"), 40)
    assert resumed.feedback_state() == {}


def test_where_scoring_may_end_weights_from_feedback_are_resumed_from_beside_scores(spec):
    """Scores that are newer than the checkpoint replace what it has."""
    first, fed = sampler_of(spec), np.arange(0, 64, 3)
    for chunk in range(4):
        first.update(chunk, np.ones(16, "f4"), 10)
    first.sampler.feedback(fed, np.full(len(fed), 9.0), 20)
    _, _, checkpointer = parts_of(spec, batch_sampler=first)
    checkpointer.commit_now(30)
    checkpointer.close()
    resumed = sampler_of(spec)  # what the weight array holds
    for chunk, version in enumerate([10, 40, 10, 10]):
        resumed.update(chunk, np.full(16, 1.0 if version == 10 else 5.0, "f4"), version)
    _, _, checkpointer = parts_of(spec, batch_sampler=resumed)
    checkpointer.close()
    assert resumed.sampler.versions.tolist() == [10.0, 40.0, 10.0, 10.0]
    expected = first.sampler.state()["weights"]
    expected[16:32] = 5.0
    np.testing.assert_array_equal(resumed.sampler.state()["weights"], expected)
    assert set(expected[fed[fed < 16]]) != {1.0}


def sampler_of(spec: RunSpec) -> BatchSampler:
    return BatchSampler(64, 16, 8, spec.sampling, seed=0, report_every=20, keep_feedback=True)


def one_step(trainer: Trainer, step: int) -> None:
    trainer.step(step, (torch.ones(8, 4) * step,), torch.arange(8) % 3, np.ones(8))


def test_a_bfloat16_model_resumes_from_a_checkpoint_committed_in_the_background(spec):
    trainer, checkpointer = incarnation(spec)
    one_step(trainer, 0)
    checkpointer.commit_soon(1)
    checkpointer.commit_now(1)  # waits for it; there is nothing else to commit
    checkpointer.close()
    again, resumed = incarnation(spec)
    resumed.close()
    assert resumed.step == 1
    committed, restored = trainer.tensors(), again.tensors()
    of_model = [t for name, t in committed.items() if name.startswith(("model.", "optimizer."))]
    assert {str(t.dtype) for t in of_model} == {"torch.bfloat16"}
    assert list(restored) == list(committed)
    for name, tensor in committed.items():
        assert restored[name].dtype is tensor.dtype
        assert torch.equal(restored[name], tensor), name
    for each in (trainer, again):
        one_step(each, 1)
    assert all(torch.equal(a, b) for a, b in zip(trainer.tensors().values(), again.tensors().values(), strict=True))


def test_a_commit_waits_for_a_store_that_takes_a_third_of_its_timeout_for_every_reply(spec, monkeypatch):
    def slowly(method):
        def slow(*args, **kwargs):
            time.sleep(0.1)
            return method(*args, **kwargs)

        return slow

    timeout = 0.3
    with dask.config.set({"isgd.storage.timeout": timeout}):
        trainer, checkpointer = incarnation(spec, timeout=timeout)
        for name in ("read", "names", "published", "create", "publish", "sweep"):
            monkeypatch.setattr(LocalFolder, name, slowly(getattr(LocalFolder, name)))
        one_step(trainer, 0)
        checkpointer.commit_soon(1)
        checkpointer.commit_now(1)
        checkpointer.close()
    assert spec.directory.checkpoints().latest().step == 1


def test_a_run_of_a_bfloat16_model_stops_and_resumes(client: Client, data, tmp_path):
    """A synchronous run: it commits the copy that it took when the round began."""

    def fit(steps: int, **changes) -> isgd.Run:
        settings = learning(steps=steps, synchronous=True)
        return isgd.fit(client, bfloat16_model, data, tmp_path / "run", learning=settings, **changes)

    run = fit(10**6)
    checkpoints = run.directory.checkpoints()
    assert any(checkpoints.names() for _ in run.watch(WAIT))
    assert run.stop(timeout=WAIT) == "stopped"
    found = checkpoints.latest()
    again = fit(found.step + 20, resume=True)
    assert again.wait(timeout=WAIT)["steps"] == found.step + 20
    assert {p.dtype for p in again.model().parameters()} == {torch.bfloat16}
