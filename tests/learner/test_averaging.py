"""Ranks that take steps of their own: what they average, when, and where they end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import in_group
from test_group_steps import BATCH, STEPS_MADE, flat, in_stretches, train_together
from torch import nn

import dask_isgd as isgd
from dask_isgd.learner import averaging
from dask_isgd.learner.averaging import Averaging
from dask_isgd.learner.gradient_sum import GroupLostError
from dask_isgd.learner.shares import share_of
from dask_isgd.learner.trainer import Trainer

STEPS, RATE = 11, 0.1


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target) ** 2


def learning(**changes) -> isgd.Learning:
    return isgd.Learning(**{"steps": STEPS, "learning_rate": RATE, "sync_every": 4, "device": "cpu"} | changes)


def make_trainer(settings: isgd.Learning) -> Trainer:
    torch.manual_seed(1)
    return Trainer(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double(), squared, settings, weighted=False)


def rows(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(size, 3, **made), torch.randn(size, **made)) for _ in range(STEPS)]


def by_hand(settings: isgd.Learning, size: int, count: int) -> torch.Tensor:
    """The trajectories of all ranks in one process, with torch's optimizers inside and outside."""
    models = [make_trainer(settings).model for _ in range(count)]
    options = {"lr": RATE, "momentum": 0.9, "nesterov": True}
    inner = [torch.optim.SGD(model.parameters(), **options) for model in models]
    outer = [p.detach().clone().requires_grad_() for p in models[0].parameters()]
    momentum = settings.outer_momentum
    step_outside = torch.optim.SGD(outer, lr=settings.outer_rate, momentum=momentum, nesterov=momentum > 0)
    for step, (x, y) in enumerate(rows(size)):
        for rank, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            share = share_of(size, rank, count)
            optimizer.zero_grad()
            squared(model(x[share]), y[share]).mean().backward()
            optimizer.step()
        if (step + 1) % settings.sync_every == 0 or step + 1 == STEPS:
            with torch.no_grad():
                for i, p in enumerate(outer):
                    p.grad = p - torch.stack([list(m.parameters())[i] for m in models]).mean(0)
                    buffers = [
                        o.state[list(m.parameters())[i]]["momentum_buffer"] for m, o in zip(models, inner, strict=True)
                    ]
                    mean = torch.stack(buffers).mean(0)
                    for buffer in buffers:
                        buffer.copy_(mean)
                step_outside.step()
                for model in models:
                    for p, new in zip(model.parameters(), outer, strict=True):
                        p.copy_(new)
    return torch.cat([p.detach().flatten() for p in outer])


def as_by_hand(settings: isgd.Learning, size: int, rank: int, count: int) -> None:
    trainer = make_trainer(settings)
    trainer.share(rank)
    trainer.averaging.begin()
    share = share_of(size, rank, count)
    for step, (x, y) in enumerate(rows(size)):
        trainer.step(step, (x[share],), y[share], np.ones(share.stop - share.start))
    assert torch.allclose(flat(trainer), by_hand(settings, size, count), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("momentum", "rate"), [(0.0, 1.0), (0.9, 0.7), (0.0, 0.5)], ids=["mean", "DiLoCo", "half"])
def test_ranks_train_as_by_hand(momentum, rate, tmp_path):
    """In shares of 3 and 2 rows; the last average comes after three steps."""
    in_group(partial(as_by_hand, learning(outer_momentum=momentum, outer_rate=rate), 5), tmp_path, 2)


def resumed(folder: Path, rank: int, count: int) -> None:
    """A trainer restored from the state after an average continues as the other one does, whatever its rank."""
    settings = learning(outer_momentum=0.9, outer_rate=0.7)
    trainer, again = make_trainer(settings), make_trainer(settings)
    (x, y), *_ = rows(4)
    share = share_of(4, rank, count)
    for each in (trainer, again):
        each.share(rank)
    trainer.averaging.begin()
    steps = partial(map, lambda step, t: t.step(step, (x[share],), y[share], np.ones(2)))
    list(steps(range(4), [trainer] * 4))
    kept = [{name: t.clone() for name, t in trainer.tensors().items()}, trainer.state()]
    dist.broadcast_object_list(kept, 0)  # a checkpoint is that of rank 0
    again.restore(*kept)
    again.averaging.begin()
    list(steps(range(4, 11), [trainer] * 7))
    list(steps(range(4, 11), [again] * 7))
    assert torch.equal(flat(trainer), flat(again))


def test_the_checkpoint_of_rank_0_is_that_of_all_ranks(tmp_path):
    in_group(partial(resumed, tmp_path), tmp_path, 2)


def different_state(rank: int, count: int) -> None:
    """A parameter that one rank alone has reached has no momentum elsewhere: no rank's momentum is averaged then."""
    parameter = nn.Parameter(torch.full((2,), float(rank)))
    tensors = {"model.w": parameter, "model.n": torch.tensor(3 + rank), "clip_bias.x": torch.tensor(float(rank))}
    if rank == 1:
        tensors["optimizer.0.momentum_buffer"] = torch.ones(2)
    Averaging([parameter], every=2, last=10, momentum=0.0, rate=1.0)(tensors)
    assert parameter.tolist() == [0.5, 0.5]
    assert tensors["model.n"].item() == 3 + rank
    assert tensors["clip_bias.x"].item() == rank


def test_ranks_whose_optimizers_differ_average_their_models(tmp_path):
    in_group(different_state, tmp_path, 2)


def test_a_rank_that_is_lost_leaves_the_others_as_they_are(monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(averaging.dist, "all_reduce", lost)
    trainer = make_trainer(learning(outer_momentum=0.9))
    trainer.averaging.begin()
    before = flat(trainer)
    with pytest.raises(GroupLostError, match="connection closed by peer"):
        trainer.averaging(trainer.tensors())
    assert torch.equal(flat(trainer), before)


def test_averages_are_due_after_the_last_step_too():
    average = Averaging([nn.Parameter(torch.zeros(1))], every=4, last=10, momentum=0.0, rate=1.0)
    assert [made for made in range(1, 11) if average.is_due(made)] == [4, 8, 10]


def with_averages(rank: int, count: int) -> None:
    """Ranks are in one state whenever they rest; what is reported is that of all ranks."""
    settings = isgd.Learning(steps=STEPS_MADE, sync_every=7, device="cpu", learning_rate=0.01)
    trainer, sampler, reporter, reports = train_together(0, rank, count, settings)
    everywhere = [torch.empty_like(flat(trainer)) for _ in range(count)]
    dist.all_gather(everywhere, flat(trainer))
    assert all(torch.equal(everywhere[0], other) for other in everywhere)
    if rank == 0:
        assert len(reporter.results) == STEPS_MADE
        assert reports == [20, 40]
        assert all(len(result.norms) == BATCH for result in reporter.results if result.norms is not None)
        assert np.isfinite(sampler.sampler.state()["weights"]).mean() > 0.8
        assert all(np.isfinite(reporter.results[step - 1].mean_gradient_sq_norm) for step in reports)
        rested = in_stretches(settings)
        assert rested == [0, 7, 14, 21, 28, 35, 45]


@pytest.mark.parametrize("count", [2, 4], ids=["2", "4, unequal"])
def test_a_group_rests_when_it_has_averaged(count, tmp_path):
    in_group(with_averages, tmp_path, count)


def towards_optimum(rank: int, count: int) -> None:
    """Least squares of heavy-tailed rows, drawn by norms that its own minibatches fed back, at a rate that falls."""
    steps = 4000
    settings = isgd.Learning(
        steps=steps, sync_every=8, learning_rate=0.02, momentum=0.0, scheduler="cosine", device="cpu"
    )
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=64))
    x = torch.from_numpy(rng.standard_normal((64, 3)) * np.sqrt(scale / scale.mean())[:, None])
    y = torch.from_numpy(rng.standard_normal(64))
    design = torch.cat([x, torch.ones(64, 1, dtype=torch.float64)], 1)
    optimum = torch.linalg.lstsq(design, y[:, None]).solution.flatten()
    torch.manual_seed(1)
    trainer = Trainer(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double(), squared, settings)
    trainer.share(rank)
    trainer.averaging.begin()
    at_optimum = ((design @ optimum - y).abs() * design.norm(dim=1)).numpy()
    q = 0.7 * at_optimum / at_optimum.sum() + 0.3 / 64
    share = share_of(8, rank, count)
    for step in range(steps):
        drawn = rng.choice(64, 8, p=q)  # the same on all ranks
        mine = drawn[share]
        trainer.step(step, (x[mine],), y[mine], 1 / (64 * q[mine]))
    start = make_trainer(settings)
    assert (flat(trainer) - optimum).norm() < 0.02 * (flat(start) - optimum).norm()


def test_averages_of_weighted_steps_find_the_optimum(tmp_path):
    in_group(towards_optimum, tmp_path, 2)
