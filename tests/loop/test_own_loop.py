"""Minibatches through real DataLoaders: their distribution, their coefficients, feedback and resuming."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dask_isgd as isgd
from dask_isgd.errors import ConfigError, DataError, LengthMismatchError
from dask_isgd.loop import WeightedIndex, weighted_collate

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
N = 40
OPEN = isgd.Sampling(gate="open", smoothing=0.1, ema_decay=0.0)
SCORES = np.random.default_rng(0).exponential(size=N)
ROWS = TensorDataset(torch.arange(N) * 10.0, torch.arange(N))


def loader_of(sampler: isgd.ImportanceBatchSampler, workers: int = 0, **settings) -> DataLoader:
    return DataLoader(
        isgd.Weighted(ROWS), batch_sampler=sampler, num_workers=workers, timeout=60 * (workers > 0), **settings
    )


def drawn(sampler, workers, count, update=None):
    """Index and coefficient (count, B) of as many minibatches; ``update`` makes scores of an index."""
    found = []
    while len(found) < count:
        for index, coefficient, (x, y) in itertools.islice(loader_of(sampler, workers), count - len(found)):
            assert torch.equal(y, index)
            assert torch.equal(x, index * 10.0)
            found.append((index.numpy(), coefficient.numpy()))
            sampler.update(index, None if update is None else update(index))
    return tuple(np.stack(part) for part in zip(*found, strict=True))


class LongPass(isgd.ImportanceBatchSampler):
    """A pass long enough to start the workers once."""

    def __len__(self) -> int:
        return 400


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_the_distribution_is_exact_with_any_number_of_workers(workers):
    sampler = LongPass(N, 32, sampling=isgd.Sampling(gate="open", scheme="independent", smoothing=0.1))
    sampler.load_scores(SCORES)
    index, coefficient = drawn(sampler, workers, 400)
    q = (SCORES + 0.1 * SCORES.mean()) / (1.1 * SCORES.sum())
    assert coefficient == pytest.approx(1 / (N * q[index]), rel=1e-6)
    counts = np.bincount(index.ravel(), minlength=N)
    assert stats.chisquare(counts, q * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_coefficient_is_that_of_its_own_draw_while_scores_change(workers):
    """Each minibatch doubles or halves scores that minibatches drawn ahead were made by."""
    sampler, generator = LongPass(N, 32, sampling=OPEN), torch.Generator().manual_seed(0)
    sampler.load_scores(SCORES)
    index, coefficient = drawn(
        sampler, workers, 400, lambda index: torch.rand(len(index), generator=generator) + 0.1 + (index % 3 == 0)
    )
    # E[c 1(i = n)] = 1/N for every n, whatever the proposals were
    shares = np.stack([((index == n) * coefficient).mean(1) for n in range(N)], axis=1)
    error = (shares.mean(0) - 1 / N) / (shares.std(0) / len(shares) ** 0.5)
    assert np.abs(error).max() < 4
    assert coefficient.std() > 0.2


def test_the_first_minibatches_are_uniform_and_the_gate_opens_when_it_pays():
    scores = torch.where(torch.arange(N) % 10 == 0, 20.0, 0.1)
    sampler = LongPass(N, 16, seed=3)
    _, coefficient = drawn(sampler, 0, 8, lambda index: scores[index])
    assert not sampler.open
    assert (coefficient == 1).all()
    drawn(sampler, 0, 390, lambda index: scores[index])
    assert sampler.open
    assert sampler.gain > 1.5
    assert sampler.candidate_gain == pytest.approx(sampler.gain, rel=0.3)
    assert set(sampler.report()) >= {"gate", "gain", "candidate_gain", "ess_fraction", "largest_coefficient"}


def test_the_gate_stays_closed_when_all_are_equal():
    sampler = LongPass(N, 16)
    _, coefficient = drawn(sampler, 0, 300, lambda index: torch.ones(len(index)))
    assert not sampler.open
    assert (coefficient == 1).all()


@pytest.mark.parametrize("at", [3, 17, 40, 41, 43])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loop_draws_what_the_uninterrupted_one_does(at, workers):
    """Across blocks of draws, passes of 40 minibatches, and what workers have taken ahead."""

    def update(index):
        return torch.from_numpy(SCORES)[index] * (1 + index % 2)

    def make():
        return isgd.ImportanceBatchSampler(4 * N, 4, sampling=isgd.Sampling(gate_gain=1.0), seed=7)

    rows = isgd.Weighted(TensorDataset(torch.arange(4 * N)))

    def run(sampler, count, found):
        while len(found) < count:
            for index, coefficient, _ in DataLoader(rows, batch_sampler=sampler, num_workers=workers):
                found.append((index.tolist(), coefficient.tolist()))
                sampler.update(index, update(index % N))
                if len(found) == count:
                    return

    whole: list = []
    run(make(), 70, whole)
    first, file = make(), io.BytesIO()
    found: list = []
    run(first, at, found)
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, 70, found)
    assert found == whole


def test_a_pass_that_is_resumed_has_what_was_left_of_it():
    sampler = isgd.ImportanceBatchSampler(N, 4)
    drawn(sampler, 0, 7)
    resumed = isgd.ImportanceBatchSampler(N, 4)
    resumed.load_state_dict(sampler.state_dict())
    assert [len(list(resumed)) for _ in range(3)] == [3, 10, 10]


def test_what_workers_took_ahead_is_not_lost_when_a_loop_breaks_off():
    whole, _ = drawn(isgd.ImportanceBatchSampler(N, 4), 0, 10)
    broken, _ = drawn(sampler := isgd.ImportanceBatchSampler(N, 4), 2, 3)
    rest, _ = drawn(sampler, 2, 7)
    assert np.array_equal(np.concatenate([broken, rest]), whole)


def test_a_loop_that_reports_nothing_draws_every_minibatch_once():
    sampler = isgd.ImportanceBatchSampler(N, 4)
    steps = [[pair.row for pair in batch] for _ in range(3) for batch in sampler]
    assert len(steps) == 30
    assert len({tuple(step) for step in steps}) == 30
    assert sampler.state_dict()["next"] == 30


@pytest.mark.parametrize("kind", ["whole", "parts", "uniform"])
def test_weights_reach_the_sampler_in_every_way(kind):
    """Scores of all, feedback of each minibatch, or none with uniform draws."""
    sampling = isgd.Sampling(uniform=True) if kind == "uniform" else OPEN
    sampler = isgd.ImportanceBatchSampler(N, 8, sampling=sampling)
    if kind == "whole":
        sampler.load_scores(torch.from_numpy(SCORES))
    drawn(sampler, 0, 100, None if kind == "whole" else lambda index: torch.from_numpy(SCORES)[index])
    _, coefficient = drawn(sampler, 0, 100)
    assert (coefficient.std() > 0.3) == (kind != "uniform")


def test_norms_of_the_loops_own_backward_pass():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    x, y = torch.randn(N, 3), torch.randint(0, 2, (N,))
    sampler = isgd.ImportanceBatchSampler(N, 8, sampling=OPEN)
    norms = isgd.gradient_norms(model, lambda o, t: torch.nn.functional.cross_entropy(o, t, reduction="none"), x, y)
    sampler.load_scores(norms)
    for index, coefficient, (inputs, targets) in DataLoader(isgd.Weighted(TensorDataset(x, y)), batch_sampler=sampler):
        with isgd.capture_norms(model) as capture:
            losses = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            isgd.weighted_mean(losses, coefficient).backward()
        found = capture.norms(scale=coefficient / len(index))
        assert found == pytest.approx(norms[index], rel=1e-4)
        sampler.update(index, found)


def test_a_block_grows_with_the_data_up_to_a_thousandth_of_them():
    blocks = [isgd.ImportanceBatchSampler(n, 64)._batch_sampler.block for n in (100, 10**6, 2 * 10**6, 10**7)]
    assert blocks == [8, 15, 31, 32]


def test_a_hundred_million_examples():
    sampler = isgd.ImportanceBatchSampler(10**8, 64, sampling=OPEN)
    index = torch.tensor([pair.row for pair in next(iter(sampler))])
    sampler.update(index, torch.ones(64))
    assert index.max() > 2**24
    assert len(sampler) == 1_562_500


def test_a_collate_function_of_ones_own():
    sampler = isgd.ImportanceBatchSampler(N, 4)
    loader = loader_of(sampler, collate_fn=weighted_collate(lambda rows: [y.item() for _, y in rows]))
    index, coefficient, labels = next(iter(loader))
    assert (index.dtype, coefficient.dtype, index.tolist()) == (torch.int64, torch.float64, labels)


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return torch.arange(N)[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(N))


@pytest.mark.parametrize("rows", [Numbers(), ROWS, list(range(N))], ids=["tensor", "dataset", "list"])
def test_a_dataset_that_is_not_wrapped_fails_instead_of_losing_coefficients(rows):
    with pytest.raises((TypeError, IndexError)):
        next(iter(DataLoader(rows, batch_sampler=isgd.ImportanceBatchSampler(N, 4))))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="Stream, which yields examples in an order of its own"):
        isgd.Weighted(Stream())
    with pytest.raises(ConfigError, match="got the index 3 without a coefficient"):
        isgd.Weighted(ROWS)[3]
    assert isgd.Weighted(ROWS)[WeightedIndex(3, 0.5)][:2] == (3, 0.5)
    with pytest.raises(ConfigError, match="batch_size: got 0"):
        isgd.ImportanceBatchSampler(N, 0)
    sampler = isgd.ImportanceBatchSampler(N, 4)
    passing = iter(sampler)
    index = torch.tensor([pair.row for pair in next(passing)])
    with pytest.raises(LengthMismatchError, match=r"got scores of shape \(3,\) for indices of shape \(4,\)"):
        sampler.update(index, torch.ones(3))
    with pytest.raises(DataError, match="of no minibatch that waits"):
        sampler.update(index.flip(0) + 1, torch.ones(4))
    sampler.update(index, torch.ones(4))
    with pytest.raises(DataError, match="once per minibatch"):
        sampler.update(index, torch.ones(4))
    next(iter(sampler))
    with pytest.raises(ConfigError, match="another pass began"):
        next(passing)
    with pytest.raises(ConfigError, match="got a state of 40 examples and a global minibatch of 4, wanted 40 and 8"):
        isgd.ImportanceBatchSampler(N, 8).load_state_dict(sampler.state_dict())
    with pytest.raises(LengthMismatchError, match=r"wanted \(40,\)"):
        sampler.load_scores(np.ones(3))


def test_the_weighted_mean_is_never_normalised():
    losses, coefficients = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert isgd.weighted_mean(losses, coefficients) == torch.tensor(3.25)
    assert isgd.weighted_mean(losses, coefficients).dtype == torch.float32
    with pytest.raises(LengthMismatchError, match="reduction='none'"):
        isgd.weighted_mean(torch.tensor(2.0), coefficients)
