"""One weighted step: unbiased, clipped as promised, restored to the bit."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import dask_isgd as isgd
from dask_isgd.core import models
from dask_isgd.core.loss import cross_entropy
from dask_isgd.errors import ConfigError, ModelError, NonFiniteLossError
from dask_isgd.learner import gradient_norm
from dask_isgd.learner.trainer import Trainer
from dask_isgd.sampling import ImportanceSampler

N = 24


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (N,), generator=generator)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.0), nn.Linear(7, 3))


def trainer(**changes) -> Trainer:
    settings = {"steps": 100, "device": "cpu", "clip_mean_factor": None}
    if changes.get("optimizer") is None:
        settings["learning_rate"] = 0.1
    return Trainer(models.build(mlp, 1), cross_entropy, isgd.Learning(**{**settings, **changes}))


def gradient(model: nn.Module, losses: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses, list(model.parameters()), retain_graph=True)])


@pytest.mark.parametrize(
    "sampling",
    [
        isgd.Sampling(),
        isgd.Sampling(smoothing=0.0),
        isgd.Sampling(max_coefficient=1.5),
        isgd.Sampling(ess_fraction=0.8),
        isgd.Sampling(half_life_steps=3.0, exponent=0.5),
    ],
    ids=lambda s: (
        f"smoothing={s.smoothing} C={s.max_coefficient} ess={s.ess_fraction} half_life_steps={s.half_life_steps}"
    ),
)
def test_over_all_draws_the_expected_weighted_gradient_is_the_full_gradient(sampling):
    """Σ_n q_n c_n g_n = (1/N) Σ g_n to 1e-10 in float64, for weights both fresh, stale and missing.

    c_n are those that draws came with, q_n the probabilities of the draw map (itself bisected in
    tests/sampling).
    """
    x, y = problem(torch.float64)
    model = models.build(mlp, 1).double()
    losses = cross_entropy(model(x), y)
    full = gradient(model, losses.mean())
    sampler = ImportanceSampler(N, 8, sampling)
    rng = np.random.default_rng(0)
    sampler.update(0, rng.exponential(size=8), 0)
    sampler.update(2, rng.exponential(size=8), 5)
    sampler.refresh(9)
    q = sampler.probabilities()
    drawn: dict[int, float] = {}
    while len(drawn) < N:
        draw = sampler.draw(16, rng)
        drawn.update(zip(draw.indices.tolist(), draw.coefficients.tolist(), strict=True))
    expected = sum(q[n] * drawn[n] * gradient(model, losses[n]) for n in range(N))
    assert abs(q.sum() - 1) < 1e-12
    assert float((expected - full).abs().max()) < 1e-10


def test_a_step_with_coefficients_is_that_of_the_weighted_loss():
    x, y = problem()
    coefficients = np.linspace(0.2, 3.0, N)
    ours, plain = trainer(momentum=0.0), models.build(mlp, 1)
    result = ours.step(0, (x,), y, coefficients)
    loss = (cross_entropy(plain(x), y) * torch.as_tensor(coefficients, dtype=torch.float32)).mean()
    loss.backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    for a, b in zip(ours.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_probe_changes_no_step_and_its_norms_are_the_examples_own():
    x, y = problem()
    coefficients = np.linspace(0.2, 3.0, N)
    measured, plain = trainer(), trainer()
    oracle = torch.stack(
        [gradient(plain.model, cross_entropy(plain.model(x[[n]]), y[[n]])[0]).norm() for n in range(N)]
    )
    result = measured.step(0, (x,), y, coefficients, measure=True)
    plain.step(0, (x,), y, coefficients)
    assert result.norms == pytest.approx(oracle.numpy(), rel=1e-5)
    for a, b in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("captures", [True, False], ids=["from the norms", "from two halves"])
def test_a_probe_estimates_the_squared_mean_gradient_without_bias(captures):
    """Over all ordered pairs of examples, each a minibatch, with coefficients: exact for each, and for the mean."""
    x, y = problem(torch.float32)
    model = models.build(mlp, 1)
    losses = cross_entropy(model(x), y)
    few, coefficients = 8, np.linspace(0.5, 2.0, 8)
    each = torch.stack([c * gradient(model, losses[n]) for n, c in enumerate(coefficients)]).double()
    exact = float(((each.sum(0) @ each.sum(0)) - (each * each).sum()) / (few * (few - 1)))
    estimates = []
    for pair in itertools.permutations(range(few), 2):
        ours = trainer()
        ours._captures = captures
        estimates.append(
            ours.step(0, (x[list(pair)],), y[list(pair)], coefficients[list(pair)], measure=True).mean_gradient_sq_norm
        )
        assert estimates[-1] == pytest.approx(float(each[pair[0]] @ each[pair[1]]), rel=1e-3, abs=1e-5)
    assert np.mean(estimates) == pytest.approx(exact, rel=1e-3, abs=1e-5)
    assert math.isnan(trainer().step(0, (x[:1],), y[:1], np.ones(1), measure=True).mean_gradient_sq_norm)


def test_a_weighted_gradient_is_clipped_at_a_multiple_of_its_running_mean():
    x, y = problem()
    each = trainer(clip_mean_factor=2.0, learning_rate=1e-3, momentum=0.0)
    norms = [each.step(k, (x,), y, np.ones(N)).gradient_norm for k in range(30)]
    before = [p.detach().clone() for p in each.model.parameters()]
    result = each.step(30, (x,), y, np.full(N, 100.0))
    moved = torch.cat([(a.detach() - b).flatten() for a, b in zip(each.model.parameters(), before, strict=True)]).norm()
    assert result.clipped
    assert float(moved) / 1e-3 == pytest.approx(2.0 * np.mean(norms), rel=0.05)
    assert not each.step(31, (x,), y, np.ones(N)).clipped


def test_uniform_draws_are_trained_as_without_clipping_to_the_bit():
    x, y = problem()
    rng = np.random.default_rng(0)
    default, plain = (
        Trainer(models.build(mlp, 1), cross_entropy, isgd.Learning(steps=200, device="cpu", **settings))
        for settings in ({}, {"clip_mean_factor": None})
    )
    assert default.learning.clip_mean_factor is not None
    for k in range(200):
        rows = rng.integers(0, N, 2)  # small minibatches: norms far from their mean
        results = [each.step(k, (x[rows],), y[rows], np.ones(2)) for each in (default, plain)]
        assert not any(result.clipped for result in results)
    for a, b in zip(default.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_measured_step_tells_how_far_clipping_moves_the_mean_gradient():
    """The same minibatch at a rate of nearly zero."""
    x, y = problem()
    each = trainer(clip_norm=1e-3, learning_rate=1e-12, momentum=0.0)
    norm = each.step(0, (x,), y, np.ones(N)).gradient_norm
    assert math.isnan(each.step(1, (x,), y, np.ones(N)).clip_bias)
    assert math.isnan(each.step(2, (x,), y, np.ones(N), measure=True).clip_bias)
    assert each.step(3, (x,), y, np.ones(N), measure=True).clip_bias == pytest.approx(1 - 1e-3 / norm, rel=1e-4)


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
def test_the_norm_of_the_gradient_after_a_step_obeys_the_absolute_bound(scale):
    """As torch's own clipping of the same gradient does it, which divides by the norm plus 1e-6."""
    x, y = problem()
    bounded, torchs = trainer(clip_norm=0.25), models.build(mlp, 1)
    result = bounded.step(0, (x,), y, np.full(N, scale))
    (scale * cross_entropy(torchs(x), y)).mean().backward()
    before = float(nn.utils.clip_grad_norm_(torchs.parameters(), 0.25))
    assert result.gradient_norm == pytest.approx(before, rel=1e-5)
    assert result.clipped == (before > 0.25)
    gradients = [p.grad for p in bounded.model.parameters()]
    assert float(nn.utils.get_total_norm(gradients)) <= 0.25 * (1 + 1e-6)
    for ours, theirs in zip(gradients, torchs.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_a_gradient_without_a_bound_is_measured_only_and_a_nonsensical_bound_is_refused():
    x, y = problem()
    result = trainer().step(0, (x,), y, np.full(N, 1e3))
    assert (result.clipped, math.isfinite(result.gradient_norm)) == (False, True)
    with pytest.raises(ConfigError, match=r"clip_norm: got 0, wanted a number above 0 or None"):
        trainer(clip_norm=0)


@pytest.mark.parametrize(
    "optimizer",
    [None, lambda p: torch.optim.Adam(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.1)],
    ids=["nesterov", "adam", "sgd"],
)
def test_a_restored_trainer_goes_on_to_the_bit(optimizer):
    x, y = problem()
    settings = {
        "optimizer": optimizer,
        "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        "clip_mean_factor": 1.0,
    }
    one, two = trainer(**settings), trainer(**settings)
    for k in range(30):
        one.step(k, (x,), y, np.ones(N))
    arrays, odd = models.to_arrays(one.tensors())
    two.restore(models.from_arrays(arrays, odd), json.loads(json.dumps(one.state())))
    for k in range(30, 40):
        assert one.step(k, (x,), y, np.ones(N)) == two.step(k, (x,), y, np.ones(N))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name])


def test_bfloat16_survives_the_way_through_numpy():
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(3)}
    arrays, odd = models.to_arrays(tensors)
    assert odd == {"a": "bfloat16"}
    back = models.from_arrays(arrays, odd)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_loss_that_is_not_finite_names_step_and_examples_and_changes_nothing():
    x, y = problem()
    x[5] = torch.nan
    each = trainer()
    before = [p.detach().clone() for p in each.model.parameters()]
    with pytest.raises(NonFiniteLossError, match=r"step 7: the loss of 1 of 24 examples .* \(indices \[105\]\)"):
        each.step(7, (x,), y, np.ones(N), indices=np.arange(100, 100 + N))
    assert all(torch.equal(a, b) for a, b in zip(each.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.such.package:model", "wanted an importable"),
        ("dask_isgd.pipelines.models:nothing", "wanted an importable"),
        (nn.Linear(2, 2), "wanted a callable that builds one"),
        (lambda: 3, "returned int"),
    ],
)
def test_what_is_no_model_is_refused(source, message):
    with pytest.raises(ModelError, match=message):
        models.build(source)


def test_a_loss_that_is_averaged_is_refused():
    x, y = problem()
    each = Trainer(models.build(mlp, 1), nn.functional.cross_entropy, isgd.Learning(steps=1, device="cpu"))
    with pytest.raises(ModelError, match=r"loss returned shape \(\).*wanted one .*loss per example, shape \(24,\)"):
        each.step(0, (x,), y, np.ones(N))


class Rooted(nn.Module):
    """An output whose absolute value has a finite root at zero, and no finite derivative there."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1.0}, {"clip_mean_factor": 1.0}], ids=str)
def test_a_gradient_that_is_not_finite_moves_nothing(settings):
    made = Trainer(
        Rooted(),
        lambda output, _: output.abs().sqrt().squeeze(1),
        isgd.Learning(steps=9, learning_rate=0.1, device="cpu", **{"clip_mean_factor": None, **settings}),
    )
    before = {name: tensor.clone() for name, tensor in made.tensors().items()}
    with pytest.raises(NonFiniteLossError, match=r"step 7: the loss is finite, its gradient is not .*indices \[5, 6\]"):
        made.step(7, (torch.ones(2, 1),), torch.zeros(2), np.ones(2), indices=np.array([5, 6]))
    assert made.tensors().keys() == before.keys(), "the optimizer made no state"
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors().items())


def test_the_norm_taken_in_the_backward_pass_is_that_of_all_gradients(monkeypatch):
    """Large and small, contiguous and not, used twice and unused, of several dtypes, also when passes add up."""
    monkeypatch.setattr(gradient_norm, "_LARGE", 30)
    model = models.build(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 6)), 1)
    model.unused = nn.Linear(6, 6)
    model.coarse = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    model.fine = nn.Parameter(torch.ones(40, dtype=torch.float64))
    parameters = list(model.parameters())
    norm = gradient_norm.GradientNorm(parameters)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    for passes in (1, 2, 1):
        for parameter in parameters:
            parameter.grad = None
        for _ in range(passes):
            loss = model[2](model[1](model[0](x))).square().sum()
            (loss + (model.coarse * 2).sum() + (model.fine * 0.1).sum()).backward()
        expected = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None) ** 0.5
        assert float(norm()) == pytest.approx(expected, rel=1e-5)
