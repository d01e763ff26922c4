"""Minibatches chosen from several: unbiased, bounded, and the same again from the same seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import MODEL
from scipy.stats import chisquare
from torch import nn

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, prepare
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.errors import ConfigError, ModelError
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.feed.prefetch import Minibatch
from dask_isgd.learner.presampling import Presampler, choose, shares
from dask_isgd.sampling import Draw

Q = np.array([0.5, 0.3, 0.2])


def pool_of(indices: np.ndarray, q: np.ndarray = Q) -> Draw:
    return Draw(indices, 1.0 / (len(q) * q[indices]), q[indices])


@pytest.mark.parametrize("most", [1.2, 3.0, np.inf])
def test_the_expectation_over_all_pools_and_choices_is_the_mean_gradient(most):
    """Exact: every pool of three draws by its probability, and every choice by its own."""
    gradients = np.random.default_rng(0).normal(size=(3, 4))
    bounds = np.array([2.0, 0.1, 0.7])  # whatever they are
    expectation = np.zeros(4)
    for indices in itertools.product(range(3), repeat=3):
        pool = pool_of(np.array(indices))
        r = shares(pool.coefficients, bounds[pool.indices], most)
        chosen = pool.coefficients / (3 * r)
        expectation += Q[pool.indices].prod() * (r * chosen) @ gradients[pool.indices]
    np.testing.assert_allclose(expectation, gradients.mean(0), atol=1e-12)


def test_examples_are_chosen_with_these_probabilities():
    rng = np.random.default_rng(1)
    pool, bounds = pool_of(np.array([0, 1, 2, 2, 0, 1])), np.array([1.0, 0.0, 3.0, 0.2, 5.0, 1.0])
    r = shares(pool.coefficients, bounds, np.inf)
    counts = np.zeros(6)
    for _ in range(4000):
        at, draw = choose(pool, bounds, 2, np.inf, rng)
        np.add.at(counts, at, 1)
        np.testing.assert_allclose(draw.coefficients, pool.coefficients[at] / (6 * r[at]))
        np.testing.assert_array_equal(draw.indices, pool.indices[at])
    assert chisquare(counts, 8000 * r).pvalue > 0.001, "stratified draws vary less than independent ones"


def test_no_coefficient_exceeds_the_bound_of_the_draws():
    """That of the product, for any pool whose own mean coefficient is below it."""
    rng, sampling = np.random.default_rng(2), Sampling(smoothing=0.3)
    most = sampling.largest_coefficient
    assert most == pytest.approx(1.3 / 0.3)
    largest = 0.0
    for _ in range(500):
        coefficients = rng.uniform(0.2, most, size=24)
        r = shares(coefficients, rng.exponential(size=24) ** 4, most)
        assert r.sum() == pytest.approx(1.0)
        largest = max(largest, (coefficients / (24 * r)).max())
    assert 0.9 * most < largest <= most * (1 + 1e-9)
    assert Sampling(smoothing=0.0).largest_coefficient == np.inf
    assert Sampling(smoothing=0.3, max_coefficient=2.0).largest_coefficient == 2.0


@pytest.mark.parametrize(
    ("bounds", "most", "coefficients"),
    [
        (np.zeros(4), 3.0, [0.5, 1.5, 1.0, 1.0]),  # each as likely as any other
        (np.full(4, np.nan), np.inf, [0.5, 1.5, 1.0, 1.0]),
        (np.array([np.inf, 2.0, 2.0, 2.0]), 3.0, [1.0] * 4),  # all alike
        (np.array([5.0, 1.0, 2.0, 3.0]), 0.9, [1.0] * 4),  # the pool's own mean is above the bound
    ],
)
def test_bounds_that_say_nothing_choose_nothing(bounds, most, coefficients):
    c = np.array([0.5, 1.5, 1.0, 1.0])
    np.testing.assert_allclose(c / (4 * shares(c, bounds, most)), coefficients)


def test_examples_without_a_coefficient_are_never_chosen():
    rng, c = np.random.default_rng(3), np.array([1.0, 0.0, 2.0, 0.0])
    pool = Draw(np.arange(4), c, np.full(4, 0.25))
    found = {int(i) for _ in range(200) for i in choose(pool, np.ones(4), 2, np.inf, rng)[0]}
    assert found == {0, 2}


def test_hard_examples_are_chosen_more_often_by_the_model_as_it_is():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = torch.randn(64, 3), torch.zeros(64, dtype=torch.int64)
    pool = Minibatch(7, Draw(np.arange(64), np.ones(64), np.full(64, 1 / 64)), (x,), y)
    before = torch.get_rng_state()
    presampler = Presampler(model, lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"), **OPTIONS)
    chosen, again = presampler.choose(pool), presampler.choose(pool)
    np.testing.assert_array_equal(chosen.draw.indices, again.draw.indices)
    np.testing.assert_array_equal(chosen.inputs[0], x[chosen.draw.indices])
    assert torch.equal(torch.get_rng_state(), before)
    losses = nn.functional.cross_entropy(model(x), y, reduction="none").detach().numpy()
    many = [presampler.choose(pool._replace(step=step)).draw for step in range(200)]
    assert np.mean([losses[draw.indices].mean() for draw in many]) > 1.1 * losses.mean()
    weighted = [np.mean(draw.coefficients * losses[draw.indices]) for draw in many]
    assert np.mean(weighted) == pytest.approx(losses.mean(), abs=4 * np.std(weighted) / 200**0.5)
    first = presampler.first(pool)
    np.testing.assert_array_equal(first.draw.indices, np.arange(16))
    assert len(first.targets) == 16


OPTIONS = {"size": 16, "most": np.inf, "seed": 5}


def test_pools_are_drawn_whole():
    sampler = BatchSampler(64, 16, 8, Sampling(gate="open"), seed=0, report_every=20, pool=3)
    assert [len(sampler.draw(step).indices) for step in range(3)] == [24] * 3


@pytest.mark.parametrize(
    ("learning", "sampling", "why"),
    [
        ({"learners": 2}, {"presample": 3}, "several learners"),
        ({}, {"presample": 3, "uniform": True}, "uniform draws"),
    ],
)
def test_what_it_cannot_do_is_said(digits, tmp_path, learning, sampling, why):
    from dask_isgd.checks.settings import check_settings

    with pytest.raises(ConfigError, match=f"Sampling.presample: got 3, wanted 1: {why}"):
        check_settings(Learning(steps=10, **learning), Scoring(), Sampling(**sampling), digits)


class Penalised(nn.Module):
    """A digit's logits, and a number that belongs to no example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x.flatten(1)), self.layer.weight.sum() * 0.0


def penalised(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output[0], target, reduction="none") + output[1]


def test_a_model_without_bounds_is_refused_before_the_run(digits, tmp_path):
    request = {"model": Penalised, "data": digits, "run_dir": tmp_path / "run", "loss": penalised}
    request["learning"] = Learning(steps=10, batch_size=8)
    prepare(RunRequest(**request))
    with pytest.raises(ModelError, match="wanted the batch"):
        prepare(RunRequest(**request, sampling=Sampling(presample=3)))


def test_a_loop_of_ones_own_is_told_that_it_cannot():
    with pytest.raises(ConfigError, match=r"Sampling\.presample: got 3, wanted 1: only `fit`"):
        isgd.ImportanceBatchSampler(100, 8, sampling=Sampling(presample=3))


@pytest.mark.cluster
def test_a_synchronous_run_is_the_same_again_and_learns(client, digits, tmp_path):
    found = []
    for name in ("one", "two"):
        run = isgd.fit(
            client,
            MODEL,
            digits,
            tmp_path / name,
            learning=Learning(steps=120, batch_size=16, synchronous=True, publish_every=40, threads=1),
            sampling=Sampling(presample=3, gate="open"),
        )
        run.wait(timeout=120, progress=False)
        found.append(run.history.load())
    np.testing.assert_array_equal(found[0].loss.values, found[1].loss.values)
    assert found[0].loss.values[-1] < 0.5 * found[0].loss.values[0]
    assert found[0].gain.values[-1] > 1.0, "measured at the reported steps"
    assert found[0].feedback.values[-1] == 1.0
