"""Several processes share each global minibatch: DDP's gradient is unbiased, and all keep the same weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import in_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import dask_isgd as isgd
from dask_isgd.errors import ConfigError
from dask_isgd.learner import batch_sampler as minibatches
from dask_isgd.loop.scored_batch_sampler import ScoredBatchSampler

N, FEATURES = 5, 3
OPEN = isgd.Sampling(gate="open", smoothing=0.3, ema_decay=0.0)
SCORES = np.array([0.25, 3.0, 1.0, 0.5, 7.0])


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(N, FEATURES, generator=generator, dtype=torch.float64),
        torch.randn(N, generator=generator, dtype=torch.float64),
    )


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0)).double()


def flat_gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def expectation_over_every_global_minibatch(rank: int, count: int) -> None:
    """The sum over all N^count global minibatches, of their probability times the gradient that DDP makes of them."""
    n = {2: 5, 4: 3}[count]  # 25 and 81 global minibatches
    (x, y), scores = (part[:n] for part in rows()), SCORES[:n]
    sampler = isgd.ImportanceBatchSampler(n, 1, sampling=OPEN)
    sampler.load_scores(scores)
    q = (scores + 0.3 * scores.mean()) / (1.3 * scores.sum())
    edges = np.concatenate([[0.0], np.cumsum(q)])
    middles = (edges[1:] + edges[:-1]) / 2
    outcomes = list(itertools.product(range(n), repeat=count))
    at = iter([middles[list(outcome)] for outcome in outcomes] + [middles[[0] * count]] * 8)
    minibatches.block_positions = lambda schemes, *_: np.stack([next(at) for _ in schemes])
    type(sampler).__len__ = lambda _: len(outcomes)
    model = DistributedDataParallel(make_model())
    expected = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    seen = np.zeros(n)
    loader = DataLoader(isgd.Weighted(TensorDataset(x, y)), batch_sampler=sampler)
    for outcome, (index, coefficient, (inputs, targets)) in zip(outcomes, loader, strict=True):
        assert index.tolist() == [outcome[rank]]
        model.zero_grad()
        isgd.weighted_mean((model(inputs) - targets) ** 2, coefficient).backward()
        expected += np.prod(q[list(outcome)]) * flat_gradient(model)
        seen[index] += 1
    full = make_model()
    ((full(x) - y) ** 2).mean().backward()
    assert torch.allclose(expected, flat_gradient(full), rtol=0, atol=1e-10)
    assert (seen == len(outcomes) / n).all()


def the_same_weights_everywhere(rank: int, count: int) -> None:
    """After every update of all shares; each process feeds back its own norms of DDP's backward pass."""
    n = 64
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, FEATURES, generator=generator), torch.randn(n, generator=generator)
    model = DistributedDataParallel(make_model().float())
    sampler = isgd.ImportanceBatchSampler(n, 4, sampling=OPEN, seed=5)
    rate, drawn, states = 0.02, [], []
    for _ in range(3):
        loader = DataLoader(isgd.Weighted(TensorDataset(x, y)), batch_sampler=sampler)
        for index, coefficient, (inputs, targets) in loader:
            with isgd.capture_norms(model.module) as capture:
                losses = (model(inputs) - targets) ** 2
                isgd.weighted_mean(losses, coefficient).backward()
            norms = capture.norms(scale=coefficient / len(index))
            if len(drawn) == 2:
                one = make_model().float()
                one.load_state_dict(model.module.state_dict())
                truth = isgd.gradient_norms(one, lambda output, target: (output - target) ** 2, inputs, targets)
                assert torch.allclose(norms, truth, rtol=1e-3)
            sampler.update(index, norms)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= rate * parameter.grad
                    parameter.grad = None
            drawn.append((index.tolist(), norms.tolist()))
    state = sampler.state_dict()
    for mine in (state["sampler"]["sampler"]["weights"].tolist(), state["next"]):
        everywhere = [None] * count
        dist.all_gather_object(everywhere, mine)
        assert all(np.array_equal(mine, other, equal_nan=True) for other in everywhere)
    everyone: list = [None] * count
    dist.all_gather_object(everyone, drawn)
    last: dict[int, float] = {}
    for step in zip(*everyone, strict=True):
        states.append(dict(last))
        for index, norms in step:
            last |= dict(zip(index, norms, strict=True))
    # what was used last: all minibatches before the last block of eight, but the newest of them
    used = states[(len(states) - 1) // 8 * 8 - 1]
    weights = dict(enumerate(state["sampler"]["sampler"]["weights"].tolist()))
    assert {k: weights[k] for k in used} == pytest.approx(used, rel=1e-5)
    other = isgd.ImportanceBatchSampler(n, 4, sampling=OPEN, seed=5)
    other.load_state_dict(state)
    assert [next(iter(other)) for _ in range(2)] == [next(iter(sampler)) for _ in range(2)]


def scores_that_process_0_reads_reach_all(rank: int, count: int) -> None:
    """Before the same minibatch; only process 0 looks for them."""
    n, chunk = 64, 16

    def rewritten():
        assert rank == 0
        return [(k, np.full(chunk, k + 1.0, np.float32), 3) for k in range(4)]

    known = [(2, np.full(chunk, 9.0, np.float32), 1)] if rank == 0 else []
    settings = {"sampling": OPEN, "seed": 1, "start": 7, "known": known, "rewritten": rewritten}
    sampler = ScoredBatchSampler(n, 4, chunk_size=chunk, **settings)
    assert sampler.drawing.sampler.versions[2] == 1
    batch = next(iter(sampler))
    weights = sampler.state_dict()["sampler"]["sampler"]["weights"].tolist()
    assert weights == [k + 1.0 for k in range(4) for _ in range(chunk)]
    everyone: list = [None] * count
    dist.all_gather_object(everyone, batch)
    assert all(0.2 < pair.coefficient != 1 for part in everyone for pair in part)
    assert len({tuple(part) for part in everyone}) == count


def settings_that_differ_are_refused(rank: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"process 0 has .* and process {count - 1}"):
        isgd.ImportanceBatchSampler(N, 1, seed=int(rank == count - 1))
    sampler = isgd.ImportanceBatchSampler(N, 1)
    passing = iter(sampler)
    drawn = next(passing)
    if rank == 0:
        next(passing)
    sampler.update([pair.row for pair in drawn], torch.ones(1))
    with pytest.raises(ConfigError, match="give their DataLoaders the same num_workers"):
        sampler.state_dict()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "check",
    [
        expectation_over_every_global_minibatch,
        the_same_weights_everywhere,
        settings_that_differ_are_refused,
        scores_that_process_0_reads_reach_all,
    ],
    ids=lambda check: check.__name__,
)
def test_processes(check, count, tmp_path):
    in_group(check, tmp_path, count)
