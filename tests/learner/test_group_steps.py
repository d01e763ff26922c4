"""Ranks without a cluster: rank 0 draws and learns from the norms of all; the others follow it."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import in_group
from torch import nn

import dask_isgd as isgd
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.feed.prefetch import Feed
from dask_isgd.learner.feed.source import RowSource
from dask_isgd.learner.feedback_pace import FeedbackPace
from dask_isgd.learner.gradient_sum import GroupLostError
from dask_isgd.learner.group import stepper as module
from dask_isgd.learner.group.packet import STEPS, Packet, Stretch, decode, length
from dask_isgd.learner.group.rank import Gathered, GatheredStep, Rank
from dask_isgd.learner.group.shared_draws import Drawn, SharedDraws
from dask_isgd.learner.group.stepper import GroupStepper
from dask_isgd.learner.shares import Shares
from dask_isgd.learner.step import Step
from dask_isgd.learner.stepper import Stepper
from dask_isgd.learner.trainer import Trainer
from dask_isgd.storage import Rows

N, BATCH, STEPS_MADE, EVERY = 96, 6, 45, 20
SAMPLING = isgd.Sampling(gate="open", smoothing=0.3)


@pytest.fixture(autouse=True)
def _whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine stretches are shorter, and norms are used sooner than by a single learner."""
    monkeypatch.setattr(module, "_LONGEST", 1e9)


class Arrays(RowSource):
    """Rows of two arrays."""

    def __init__(self, draws) -> None:
        super().__init__(draws, "for a test")
        rng = np.random.default_rng(0)
        self.x, self.y = rng.standard_normal((N, 3)), rng.standard_normal(N) * np.arange(N) / N

    def gather(self, indices):
        return Rows((self.x[indices],), self.y[indices])


class Prepared:
    device = torch.device("cpu")

    def __call__(self, inputs, target):
        return tuple(map(torch.from_numpy, inputs)), torch.from_numpy(target)


class Reporter:
    def __init__(self) -> None:
        self.results = []

    def add(self, result) -> None:
        self.results.append(result)


def make_trainer(seed: int = 1, settings: isgd.Learning | None = None) -> Trainer:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()
    return Trainer(
        model, lambda output, target: (output - target) ** 2, settings or isgd.Learning(steps=1, device="cpu")
    )


def make_sampler() -> BatchSampler:
    return BatchSampler(N, 32, BATCH, SAMPLING, seed=3, report_every=EVERY, scored=False)


def make_feed(draws, ahead: int) -> Feed:
    return Feed(Arrays(draws), Prepared(), ahead=ahead, timeout=20.0)


def train_alone() -> tuple[Trainer, BatchSampler, Reporter, list[int]]:
    trainer, sampler, reporter, reports = make_trainer(), make_sampler(), Reporter(), []
    options = {"pace": FeedbackPace(fixed=True), "report_every": EVERY}
    stepper = Stepper(trainer, make_feed(sampler, 0), sampler, reporter, reports.append, lag=0, **options)
    for step in range(STEPS_MADE):
        stepper.take(step, STEPS_MADE)
    stepper.settle()
    return trainer, sampler, reporter, reports


def train_together(ahead: int, rank: int, count: int, settings: isgd.Learning | None = None):
    """Train as rank ``rank``; return what rank 0 has at the end, and the parameters of the others."""
    trainer = make_trainer(1 + rank, settings)  # only rank 0 has the right parameters
    draws = SharedDraws(BATCH, rank, count, 20.0)
    sampler, reporter, reports = make_sampler(), Reporter(), []
    with closing(make_feed(draws, ahead)) as feed, closing(draws):
        this = Rank(trainer, feed, draws, Shares(), size=BATCH, report_every=EVERY)
        lookahead = max(this.agree(feed.lookahead))
        this.synchronise()
        if rank == 0:
            options = {"pace": FeedbackPace(fixed=True), "report_every": EVERY, "lookahead": lookahead, "step": 0}
            stepper = GroupStepper(this, sampler, reporter, reports.append, **options)
            for step in range(STEPS_MADE):
                if stepper.at_rest:
                    stepper._sent -= 10.0
                    stepper.keep_waiting()
                stepper.take(step, STEPS_MADE)
                assert stepper.next_step == step + 1
            stepper.settle()
            stepper.end()
        else:
            while not (stretch := this.receive()).end:
                for step in range(stretch.first, stretch.first + stretch.steps):
                    this.take(step, stretch)
                if stretch.steps:
                    assert this.gather(this.results(), leaving=False).leaving == []
    return trainer, sampler, reporter, reports


def in_stretches(settings: isgd.Learning) -> list[int]:
    """The steps at which a group may stop."""
    rank = SimpleNamespace(trainer=make_trainer(settings=settings), feed=None, send=lambda _: None)
    rank.take, rank.results, rank.gather = lambda *_: None, list, lambda *_, **__: Gathered([], [])
    options = {"pace": FeedbackPace(fixed=True), "report_every": EVERY, "lookahead": 0, "step": 0}
    stepper, rested = GroupStepper(rank, make_sampler(), Reporter(), lambda _: None, **options), []
    stepper._use = lambda arrived: None
    for step in range(STEPS_MADE):
        rested += [step] * stepper.at_rest
        stepper.take(step, STEPS_MADE)
    return rested + [STEPS_MADE] * stepper.at_rest


def flat(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parameters])


def as_alone(ahead: int, rank: int, count: int) -> None:
    """A group takes the steps of a single learner that draws the same."""
    trainer, sampler, reporter, reports = train_together(ahead, rank, count)
    everywhere = [torch.empty_like(flat(trainer)) for _ in range(count)]
    dist.all_gather(everywhere, flat(trainer))
    assert all(torch.equal(everywhere[0], other) for other in everywhere)
    if rank == 0 and ahead == 0:
        single, its_sampler, its_reporter, its_reports = train_alone()
        assert torch.allclose(flat(trainer), flat(single), rtol=1e-5, atol=1e-7)
        assert reports == its_reports
        for name in ("loss", "gradient_norm", "mean_gradient_sq_norm"):
            mine, its = ([getattr(r, name) for r in each.results] for each in (reporter, its_reporter))
            np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-7, err_msg=name)
        weights, its_weights = (each.sampler.state()["weights"] for each in (sampler, its_sampler))
        np.testing.assert_allclose(weights, its_weights, rtol=1e-4)
        assert np.isfinite(weights).mean() > 0.8


@pytest.mark.parametrize(("count", "ahead"), [(2, 0), (4, 0), (2, 2)], ids=["2", "4, unequal", "2, drawn ahead"])
def test_a_group_trains_as_a_single_learner_does(count, ahead, tmp_path):
    in_group(partial(as_alone, ahead), tmp_path, count)


def test_the_last_stretch_of_a_group_that_is_lost_is_reported():
    """Its steps are taken and will be committed, although the norms of other ranks never arrive."""
    result, steps = Step(0.5, np.ones(BATCH // 2), np.nan, 1.0, False), 4

    def lost(done, *, leaving):
        raise GroupLostError("gone")

    rank = SimpleNamespace(
        trainer=SimpleNamespace(learning=isgd.Learning(steps=1), averaging=None),
        feed=None,
        send=lambda _: None,
        take=lambda *_: None,
        gather=lost,
    )
    rank.results = lambda: [GatheredStep(step, result, step == steps - 1) for step in range(steps)]
    reporter, reports = Reporter(), []
    options = {"pace": FeedbackPace(fixed=True), "report_every": steps, "lookahead": 0, "step": 0}
    stepper = GroupStepper(rank, make_sampler(), reporter, reports.append, **options)
    stepper._seconds = 1e-6
    for step in range(steps - 1):
        stepper.take(step, STEPS_MADE)
    with pytest.raises(GroupLostError, match="gone"):
        stepper.take(steps - 1, STEPS_MADE)
    assert stepper.next_step == steps
    assert [(each.loss, each.norms) for each in reporter.results] == [(0.5, None)] * steps
    assert reports == [steps]


def write_bits(folder: Path, rank: int, count: int) -> None:
    trainer, *_ = train_together(2, rank, count)
    np.save(folder / f"{rank}.npy", flat(trainer).numpy())


def test_two_groups_have_the_same_bits(tmp_path):
    found = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        in_group(partial(write_bits, folder), folder, 3)
        found.append([np.load(folder / f"{rank}.npy") for rank in range(3)])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(("follows", "rate"), [(True, 1.5), (False, 1.0)])
def test_all_ranks_take_a_stretch_at_the_rate_that_rank_0_measured(follows, rate, monkeypatch):
    sent, sampler = [], make_sampler()
    monkeypatch.setattr(sampler, "rate_gain", lambda: 1.5)
    trainer = SimpleNamespace(learning=isgd.Learning(steps=1, learning_rate_gain=follows), averaging=None)
    rank = SimpleNamespace(trainer=trainer, feed=None, send=sent.append, take=lambda *_: None)
    options = {"pace": FeedbackPace(fixed=True), "report_every": 4, "lookahead": 0, "step": 0}
    GroupStepper(rank, sampler, Reporter(), lambda _: None, **options).take(0, STEPS_MADE)
    assert [packet.stretch.rate for packet in sent] == [rate]


def test_packets_carry_draws_and_norms_to_the_bit():
    rng = np.random.default_rng(0)
    drawn = {9 + i: Drawn(rng.integers(0, 2**52, 5), rng.random(5)) for i in range(STEPS)}
    sent = Packet(Stretch(7, 3, 0b101, 40, rate=1.7), drawn, more=True)
    encoded = sent.encode(5)
    assert encoded.shape == (length(5),)
    received = decode(encoded, 5)
    assert received._replace(drawn={}) == sent._replace(drawn={})
    assert [sent.stretch.wants_norms(step) for step in (7, 8, 9)] == [True, False, True]
    for step, (indices, coefficients) in drawn.items():
        np.testing.assert_array_equal(received.drawn[step].indices, indices)
        np.testing.assert_array_equal(received.drawn[step].coefficients, coefficients)
