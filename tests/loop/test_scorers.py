"""Scorers on a real cluster beside a loop that is not ours: what it draws, and what may be lost."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from torch.utils.data import DataLoader, TensorDataset

import dask_isgd as isgd
from dask_isgd.core.batch import Prepare
from dask_isgd.core.loss import cross_entropy
from dask_isgd.core.models import build
from dask_isgd.errors import ConfigError, LeaseLostError, ModelError, RunMismatchError
from dask_isgd.storage import Dataset

MODEL = "dask_isgd.pipelines.models:digits"
OPEN = isgd.Sampling(gate="open")
WAIT = 60


class Loop:
    """A plain loop on the digits: ``trains`` until a condition holds."""

    def __init__(self, client: Client, data: Dataset, run_dir: Path, **settings) -> None:
        rows = data.read(0, len(data))
        (x,), y = Prepare(data, torch.device("cpu"))(rows.inputs, rows.target)
        self.rows = isgd.Weighted(TensorDataset(x, y))
        self.model = build(MODEL, seed=0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        scoring = isgd.Scoring(chunk_size=data.chunk_size)
        settings = {"sampling": OPEN, "publish_every": 5, "scoring": scoring, **settings}
        self.scorers = isgd.Scorers(client, MODEL, data, run_dir, **settings)
        self.coefficients: list[torch.Tensor] = []
        self.indices: list[list[int]] = []
        self.step = 0

    def open(self, state=None) -> Loop:
        """Make the sampler, inside of ``with self.scorers``."""
        self.sampler = self.scorers.batch_sampler(32)
        if state is not None:
            self.scorers.load_state_dict(state["scorers"])
            self.model.load_state_dict(state["model"])
        self.step = self.scorers.step
        return self

    def trains(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not until():
            for index, coefficient, (x, y) in DataLoader(self.rows, batch_sampler=self.sampler):
                losses = cross_entropy(self.model(x), y)
                loss = isgd.weighted_mean(losses, coefficient)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.scorers.publish(self.model, self.step, loss=loss)
                self.step += 1
                self.coefficients.append(coefficient)
                self.indices.append(index.tolist())
                if until():
                    return
                assert time.monotonic() < deadline, f"not within {WAIT} s; step {self.step}"

    @property
    def newest(self) -> float:
        """The latest version that a chunk was scored with; -1 before there is one."""
        return float(np.nanmax(self.sampler.drawing.sampler.versions, initial=-1.0))

    @property
    def state(self) -> dict:
        return {"model": self.model.state_dict(), "scorers": self.scorers.state_dict()}


def test_a_loop_follows_the_scores_and_the_run_is_one_of_fit(client, digits, run_dir):
    loop = Loop(client, digits, run_dir)
    with loop.scorers:
        run = isgd.attach(client, run_dir)
        loop.open().trains(lambda: bool(np.isfinite(loop.sampler.drawing.sampler.versions).all()) and loop.newest > 20)
        known = loop.step
        loop.trains(lambda: loop.step > known + 60)  # the minibatch that was drawn before is behind, and 50 more
        loop.trains(lambda: loop.sampler.gain > 0 and run.latest.get("examples_scored", 0) > 0)
        assert run.status == "running"
        assert run.latest["step"] > 0
    late = torch.stack(loop.coefficients[-50:])
    assert late.std() > 0.1
    assert late.mean() == pytest.approx(1.0, abs=0.1)  # E[c] = 1
    assert (torch.stack(loop.coefficients[:8]) == 1).all()  # before the first scores
    assert run.status == "finished"
    history = run.history
    assert (np.diff(history.step.values) > 0).all()
    assert history.loss.values[-1] < history.loss.values[0]
    assert run.summary()["examples_scored"] >= len(digits)
    with pytest.raises(RunMismatchError, match="holds a run of Scorers, this is fit"):
        isgd.fit(client, MODEL, digits, run_dir, learning=isgd.Learning(steps=5), resume=True)


def test_weights_are_the_norms_of_a_published_version(client, digits, run_dir):
    """The parameters are not trained: every version has the same norms."""
    loop = Loop(client, digits, run_dir)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    with loop.scorers:
        sampler = loop.open().sampler.drawing.sampler
        loop.trains(lambda: bool(np.isfinite(sampler.versions).all()))
        found = np.concatenate([sampler._weights.chunk(chunk) for chunk in range(sampler.n_chunks)])
    (x, y) = loop.rows.dataset.tensors
    assert found == pytest.approx(isgd.gradient_norms(loop.model, cross_entropy, x, y).numpy(), rel=1e-3)


@pytest.mark.parametrize("role", ["scorer", "coordinator"])
def test_a_killed_worker_costs_freshness_only(client, digits, run_dir, role):
    loop = Loop(client, digits, run_dir)
    with loop.scorers:
        run = isgd.attach(client, run_dir)
        loop.open().trains(lambda: loop.newest > 0)
        leases = run.directory.leases("coordinator")
        coordinator = leases.owner(leases.highest())["address"]
        pids = client.run(os.getpid)
        victim = coordinator if role == "coordinator" else next(a for a in pids if a != coordinator)
        os.kill(pids[victim], signal.SIGKILL)
        killed = loop.step
        loop.trains(lambda: loop.newest > killed + 20)
        assert (leases.highest() > 1) == (role == "coordinator")
    assert run.status == "finished"


SCRIPT = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_scorers import Loop, client_of, Dataset
address, data, run_dir, checkpoint = sys.argv[1:]
with client_of(address) as client:
    loop = Loop(client, Dataset(data, group="train"), run_dir)
    with loop.scorers:
        loop.open()
        while True:
            there = loop.step + 40
            loop.trains(lambda: loop.step >= there and loop.newest > 0)
            torch.save({{**loop.state, "step": loop.step}}, checkpoint + ".new")
            __import__("os").replace(checkpoint + ".new", checkpoint)
            print(loop.step, flush=True)
"""


def client_of(address: str) -> Client:
    return Client(address, set_as_default=False)


def test_a_killed_loop_continues_from_its_own_checkpoint(client, digits, run_dir, tmp_path):
    checkpoint = tmp_path / "loop.pt"
    arguments = [client.scheduler.address, str(digits.url), str(run_dir), str(checkpoint)]
    root = str(Path(isgd.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as first:
        for _ in range(2):
            assert first.stdout.readline().strip().isdecimal()
        first.kill()
    state = torch.load(checkpoint, weights_only=True)
    weights = isgd.attach(client, run_dir).directory.open_weights().read_all()
    loop = Loop(client, digits, run_dir, resume=True)
    with loop.scorers:
        loop.open(state)
        assert loop.step == state["step"]
        known = loop.sampler.drawing.sampler.versions
        assert np.isfinite(known).sum() * digits.chunk_size >= np.isfinite(weights).sum() * 0.9
        begun = loop.step
        loop.trains(lambda: loop.newest > begun + 10)
        assert len(set(map(tuple, loop.indices))) == len(loop.indices)
        assert (torch.stack(loop.coefficients[:8]) != 1).any()
    run = isgd.attach(client, run_dir)
    assert run.directory.leases("learner").highest() == 2
    steps = run.history.step.values
    assert (np.diff(steps) > 0).all()
    assert (np.diff(run.history.seconds.values) > 0).all(), "the seconds of all incarnations"
    groups = zarr.open_group(run.directory.history, mode="r")
    assert groups["learner-0002"].attrs["start_step"] == begun


def test_a_cluster_that_is_gone_is_said_once_and_the_loop_goes_on(client, digits, run_dir, caplog):
    mine = client_of(client.scheduler.address)
    loop = Loop(mine, digits, run_dir)
    with caplog.at_level(logging.WARNING, "dask_isgd"), loop.scorers:
        loop.open().trains(lambda: loop.newest > 0)
        mine.close()
        gone = loop.step
        began = time.monotonic()
        loop.trains(lambda: loop.step >= gone + 400)
        seconds = time.monotonic() - began
        loop.trains(lambda: any("scores get older until one is" in r.message for r in caplog.records))
    assert seconds < WAIT / 2
    assert sum("scores get older until one is" in record.message for record in caplog.records) == 1


def test_a_loop_that_was_taken_over_is_told(client, digits, run_dir):
    first, second = Loop(client, digits, run_dir), Loop(client, digits, run_dir, resume=True)
    with first.scorers, second.scorers:  # the second one resumes the run while the first one trains
        first.open()
        with pytest.raises(LeaseLostError, match="is fenced"):
            first.trains(lambda: False)
        second.open().trains(lambda: second.newest > 0)
    assert isgd.attach(client, run_dir).directory.leases("learner").highest() == 2


def test_mistakes_are_named(client, digits, run_dir):
    loop = Loop(client, digits, run_dir)
    with pytest.raises(ConfigError, match="called outside of `with`"):
        loop.scorers.batch_sampler(8)
    with pytest.raises(ConfigError, match="got client=None"), isgd.Scorers(None, MODEL, digits, run_dir):
        pass
    with loop.scorers:
        with pytest.raises(ConfigError, match="before batch_sampler"):
            loop.scorers.publish(loop.model, 0)
        loop.open()
        with pytest.raises(ConfigError, match="called twice"):
            loop.scorers.batch_sampler(8)
        with pytest.raises(ModelError, match="got a model of other parameters"):
            loop.scorers.publish(torch.nn.Linear(2, 2), 0)
