"""The benchmark of staleness still runs, its gradients are right, and its figures mean what is documented."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dask_isgd.norms import NormEngine

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import simulation
import staleness

pytestmark = pytest.mark.skipif(not simulation.FOLDER.exists(), reason="needs Debian's dataset-fashion-mnist")


def test_tiny_run(capsys):
    rows = staleness.main(["--tiny"])
    uniform, default = rows
    assert (uniform["policy"], default["policy"]) == ("uniform", "default")
    assert all(len(row["loss"]) == 6 and row["loss"][-1] < row["loss"][0] for row in rows)
    assert uniform["gain"] == [1.0] * 3
    assert uniform["smoothing_factor"] == uniform["ideal_gain"]
    costs = np.array(default["smoothing_factor"]) * np.array(default["staleness_factor"])
    np.testing.assert_allclose(costs, default["stale_over_ideal"], rtol=1e-3)
    assert all(gain < ideal for gain, ideal in zip(default["gain"], default["ideal_gain"], strict=True))
    assert "| default | 4 | 0.1 | 0 |" in capsys.readouterr().out


def test_norms_and_gradients_are_autograd_s():
    mlp = simulation.Mlp((12, 8, 8, 3), seed=0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for layer, weight, bias in zip(model[::2], mlp.weights, mlp.biases, strict=True):
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
    x, y = torch.randn(20, 12, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3
    scale = torch.linspace(0.1, 2, 20)
    norms, gradients = mlp.backward(mlp.forward(x), y, scale)
    wanted = NormEngine(model, nn.CrossEntropyLoss(reduction="none"))(x, y)[0]
    torch.testing.assert_close(norms, wanted.float(), rtol=1e-4, atol=1e-6)
    torch.dot(nn.functional.cross_entropy(model(x), y, reduction="none"), scale).backward()
    for got, layer in zip(gradients[:3], model[::2], strict=True):
        torch.testing.assert_close(got, layer.weight.grad.T)
    for got, layer in zip(gradients[3:], model[::2], strict=True):
        torch.testing.assert_close(got, layer.bias.grad)


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        pytest.param([1.0] * 20, 0, id="flat"),
        pytest.param([2.0] * 4 + [9.0] + [1.0] * 10, 0, id="none counts in the first 500 updates"),
        pytest.param([1.0] * 6 + [1.6, 1.5, 1.4], 1, id="above 1.5 times the smallest so far"),
        pytest.param([1.0] * 6 + [math.nan], 1, id="a NaN counts"),
    ],
)
def test_spikes(losses, count):
    assert simulation.spikes(losses) == count


def test_averages_by_age():
    """w² ← (c k w² + g²) / (c k + 1) with k = exp(-Δt/τ), c ← c k + 1; a norm that arrives late has k = 1."""
    averages = simulation.Averages(2, tau=10.0)
    both = np.array([0, 1])
    np.testing.assert_allclose(averages.take(both, np.array([3.0, 1.0]), 5), [3.0, 1.0])
    k = math.exp(-1.0)
    np.testing.assert_allclose(averages.take(both[:1], np.array([1.0]), 15) ** 2, (k * 9 + 1) / (k + 1))
    former = (k * 9 + 1) / (k + 1)
    np.testing.assert_allclose(averages.take(both[:1], np.array([2.0]), 12) ** 2, ((k + 1) * former + 4) / (k + 2))
    np.testing.assert_allclose(averages.take(both[1:], np.array([2.0]), 5) ** 2, 2.5)


def test_a_minibatch_chosen_from_several_is_unbiased_for_the_pool():
    data = simulation.images(2000)
    policy = simulation.Policy(presample=3)
    run = simulation.Simulation(data, policy, rate=0.1, seed=0, speed=0, width=8)
    pool = run.sampler.draw(3 * run.batch, run.rng)
    value = np.random.default_rng(1).random(run.n)
    wanted = np.mean(pool.coefficients * value[pool.indices])
    model = run.model.published()
    chosen = (run._chosen(pool, model) for _ in range(400))
    means = np.array([np.mean(draw.coefficients * value[draw.indices]) for draw in chosen])
    assert abs(means.mean() - wanted) < 4 * means.std() / 20
