"""The gradient of a group is that of its global minibatch: exact, whatever the shares, and unbiased over all ranks."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import in_group
from torch import nn

import dask_isgd as isgd
from dask_isgd.learner.shares import share_of
from dask_isgd.learner.trainer import Trainer, Whole

FEATURES = 3
Q = np.array([0.5, 0.3, 0.2])


class Alone(nn.Module):
    """Layers of two dtypes' worth of buckets, one of which no loss reaches and one that only some inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def make_trainer() -> Trainer:
    torch.manual_seed(1)
    still = partial(torch.optim.SGD, lr=0.0)
    learning = isgd.Learning(steps=1, optimizer=still, clip_mean_factor=None, device="cpu")
    return Trainer(Alone().double(), squared, learning)


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target) ** 2


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, FEATURES, generator=generator, dtype=torch.float64),
        torch.randn(n, generator=generator, dtype=torch.float64),
    )


def gradient(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def expectation(size: int, captured: bool, rank: int, count: int) -> None:
    """Over all N^M global minibatches, in shares that differ in size."""
    n = 3 if size < 5 else 2
    (x, y), q = rows(n), Q[:n] / Q[:n].sum()
    trainer = make_trainer()
    trainer.share(rank)
    trainer._sum._buckets[0].flat.fill_(7.0)
    trainer._captures = captured
    share = share_of(size, rank, count)
    expected, square, lost = 0.0, 0.0, 0.0
    for outcome in itertools.product(range(n), repeat=size):
        drawn = np.array(outcome)
        mine, coefficients = drawn[share], 1.0 / (n * q[drawn])
        probability = q[drawn].prod()
        whole = Whole(size, float(coefficients.max()))
        step = trainer.step(
            0, (x[mine],), y[mine], coefficients[share], norms=captured, measure=True, indices=mine, whole=whole
        )
        expected = expected + probability * gradient(trainer)
        square += probability * step.mean_gradient_sq_norm
        lost += probability * step.loss
        assert all(p.grad is None for p in trainer.model.unused.parameters())
        if captured:
            truth = isgd.gradient_norms(trainer.model, squared, x[mine], y[mine])
            np.testing.assert_allclose(step.norms, truth, rtol=1e-4)
    full = make_trainer()
    losses = squared(full.model(x), y)
    losses.mean().backward()
    assert torch.allclose(expected, gradient(full), rtol=0, atol=1e-10)
    assert square == pytest.approx(float(gradient(full).square().sum()), rel=1e-4)
    assert lost == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("count", "size", "captured"),
    [(2, 2, True), (2, 3, False), (4, 5, True)],
    ids=["equal shares", "unequal shares, no norms", "four ranks, unequal shares"],
)
def test_expectation_is_the_mean_gradient(count, size, captured, tmp_path):
    in_group(partial(expectation, size, captured), tmp_path, count)


def one_bad_loss(rank: int, count: int) -> None:
    """A loss that is not finite on one rank is refused on all, and its rank names the example."""
    (x, y), trainer = rows(2), make_trainer()
    trainer.share(rank)
    y[1] = torch.nan
    mine = np.array([rank])
    launched = trainer.launch(3, (x[mine],), y[mine], np.ones(1), indices=mine, whole=Whole(2, 1.0))
    with pytest.raises(isgd.errors.NonFiniteLossError, match="step 3") as caught:
        launched.result()
    assert caught.value.indices == ((1,) if rank == 1 else ())


def a_parameter_that_one_rank_does_not_reach(rank: int, count: int) -> None:
    """It has the other rank's gradient, in a group with buckets of one parameter each."""
    from dask_isgd.learner.gradient_sum import GradientSum

    layers = [nn.Linear(2, 2) for _ in range(3)]
    parameters = [p for layer in layers for p in layer.parameters()]
    total = GradientSum(parameters, bucket_bytes=1)
    total.begin(squares=True)
    used = layers[rank : rank + 1]
    loss = sum(layer.weight.sum() * (rank + 1) for layer in used)
    loss.backward()
    found = total.finish(loss.detach())
    grads = [layer.weight.grad for layer in layers]
    assert [None if g is None else g.unique().tolist() for g in grads] == [[1.0], [2.0], None]
    assert all(layer.bias.grad is None for layer in layers)
    assert found.squares.item() == 4 * 1 + 4 * 4
    everywhere = [torch.zeros(()) for _ in range(count)]
    dist.all_gather(everywhere, found.loss)
    assert everywhere[0] == everywhere[1]


@pytest.mark.parametrize("check", [one_bad_loss, a_parameter_that_one_rank_does_not_reach], ids=lambda c: c.__name__)
def test_ranks_that_differ(check, tmp_path):
    in_group(check, tmp_path, 2)
