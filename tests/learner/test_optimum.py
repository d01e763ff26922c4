"""Convex problems with a known optimum: the default clipping leaves it where it is.

Real ``Trainer``, ``BatchSampler`` and gate, momentum 0.9, a rate that decays over the second half; the parameters of
the last quarter are averaged. Rare positives and outliers are the hard cases: nearly all large gradients point the same
way, and clipping uniform draws at the mean norm moved the mean prediction to 0.07 of the right one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import dask_isgd as isgd
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.trainer import Trainer

N, FEATURES, CHUNK, REPORT_EVERY = 20_000, 8, 500, 20


class Problem(NamedTuple):
    """Linear models: ``x`` (N, P) with a last column of ones, ``y`` (N,)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    logistic: bool
    optimum: NDArray[np.float64]

    def residuals(self, w: NDArray[np.float64], rows: slice = slice(None)) -> NDArray[np.float64]:
        z = self.x[rows] @ w
        return (1 / (1 + np.exp(-z)) if self.logistic else z) - self.y[rows]

    def norms(self, w: NDArray[np.float64], rows: slice) -> NDArray[np.float32]:
        return (np.abs(self.residuals(w, rows)) * np.linalg.norm(self.x[rows], axis=1)).astype(np.float32)

    def loss(self, w: NDArray[np.float64]) -> float:
        z = self.x @ w
        losses = np.logaddexp(0, z) - self.y * z if self.logistic else 0.5 * (z - self.y) ** 2
        return float(losses.mean())

    def mean_prediction(self, w: NDArray[np.float64]) -> float:
        return float((self.residuals(w) + self.y).mean())


@functools.cache
def problem(kind: str) -> Problem:
    """Return "positives 0.01" (that share of them), "outliers" (1 % of targets) or "lognormal noise"."""
    rng = np.random.default_rng(0)
    if kind.startswith("positives"):
        y = np.zeros(N)
        y[: round(float(kind.split()[1]) * N)] = 1
        rng.shuffle(y)
        x = rng.normal(size=(N, FEATURES)) + y[:, None] * np.array([1.2, 1.2] + [0] * (FEATURES - 2))
        x = np.c_[x, np.ones(N)]
        return Problem(x, y, True, newton(x, y))
    x = rng.normal(size=(N, FEATURES))
    y = x @ rng.normal(size=FEATURES)
    if kind == "outliers":
        y += rng.normal(size=N)
        y[rng.permutation(N)[: N // 100]] += 30
    else:
        y += rng.lognormal(0, 1.5, N)
    x = np.c_[x, np.ones(N)]
    return Problem(x, y, False, np.linalg.lstsq(x, y, rcond=None)[0])


def newton(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (p - y))
    return w


class Result(NamedTuple):
    excess: float
    """Loss above the optimum's, over the optimum's."""
    prediction: float
    """Mean prediction over the optimum's."""
    clipped: float
    open: float
    """Shares of the steps."""


def train(
    kind: str,
    batch: int,
    rate: float,
    *,
    seed: int,
    steps: int,
    score_every: int | None = 4,
    sampling: dict[str, object] | None = None,
    **learning: object,
) -> Result:
    """Train with one chunk scored per ``score_every`` steps (None: never), a tenth of that while the gate is closed."""
    given = problem(kind)
    settings = isgd.Sampling(**(sampling or {}))
    torch.manual_seed(seed)
    model = nn.Linear(FEATURES, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        z = output.squeeze(1)
        if given.logistic:
            return nn.functional.binary_cross_entropy_with_logits(z, target, reduction="none")
        return 0.5 * (z - target) ** 2

    def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, max(0.02, 2 * (1 - t / steps))))

    rates = {"learning_rate": rate, "momentum": 0.9, "scheduler": decay}
    trainer = Trainer(model, loss, isgd.Learning(steps=steps, batch_size=batch, device="cpu", **rates, **learning))
    sampler = BatchSampler(N, CHUNK, batch, settings, seed=seed, report_every=REPORT_EVERY)
    inputs = torch.from_numpy(given.x[:, :-1].astype(np.float32))
    targets = torch.from_numpy(given.y.astype(np.float32))
    mean, clipped, opened, chunk = np.zeros(FEATURES + 1), 0, 0, 0
    for step in range(steps):
        w = np.r_[model.weight.detach().numpy()[0], model.bias.detach().numpy()].astype(np.float64)
        if step % 32 == 0:
            sampler.refresh(step)
        if score_every is not None and step % (score_every * (10 if sampler.idle else 1)) == 0:
            number = chunk % (N // CHUNK)
            sampler.update(number, given.norms(w, slice(number * CHUNK, (number + 1) * CHUNK)), step)
            chunk += 1
        draw = sampler.draw(step)
        rows, measure = torch.from_numpy(draw.indices), (step + 1) % REPORT_EVERY == 0
        norms = settings.feedback and not settings.uniform
        result = trainer.step(step, (inputs[rows],), targets[rows], draw.coefficients, norms=norms, measure=measure)
        sampler.learned(step, draw, result, measure=measure)
        clipped += result.clipped
        opened += sampler.open
        mean += w * (step >= steps - steps // 4)
    mean /= steps // 4
    excess = given.loss(mean) / given.loss(given.optimum) - 1
    prediction = given.mean_prediction(mean) / given.mean_prediction(given.optimum)
    return Result(excess, prediction, clipped / steps, opened / steps)


PROBLEMS = (
    pytest.param("positives 0.002", 128, 0.05, id="0.2 % positives"),
    pytest.param("positives 0.005", 128, 0.05, id="0.5 % positives"),
    pytest.param("positives 0.01", 32, 0.05, id="1 % positives"),
    pytest.param("positives 0.01", 4, 0.01, id="1 % positives, minibatches of 4"),
    pytest.param("positives 0.02", 128, 0.05, id="2 % positives"),
    pytest.param("positives 0.1", 128, 0.05, id="10 % positives"),
    pytest.param("outliers", 32, 0.01, id="outliers"),
    pytest.param("outliers", 4, 0.002, id="outliers, minibatches of 4"),
    pytest.param("outliers", 128, 0.01, id="outliers, minibatches of 128"),
    pytest.param("lognormal noise", 128, 0.01, id="lognormal noise"),
)
SITUATIONS = (
    pytest.param({}, id="the default run"),
    pytest.param({"sampling": {"gate": "open"}, "score_every": 40}, id="slow scorers, gate kept open"),
)
NEVER_CLIPPED = (
    pytest.param({"sampling": {"uniform": True}}, id="uniform"),
    pytest.param({"sampling": {"feedback": False}, "score_every": None}, id="neither scores nor feedback"),
)


def compare(kind: str, batch: int, rate: float, *, seeds: int, steps: int, **situation) -> None:
    """Assert that clipping by default at most doubles the excess loss, and that it clips in earnest.

    Excess losses of single seeds differ by a factor of four: where few seeds seem to break the bound, three times as
    many decide.
    """

    def runs(seeds: range) -> tuple[list[Result], list[Result]]:
        return tuple(
            [train(kind, batch, rate, seed=seed, steps=steps, **situation, **learning) for seed in seeds]
            for learning in ({}, {"clip_mean_factor": None})
        )

    def kept(default: list[Result], plain: list[Result]) -> bool:
        return bool(np.mean([r.excess for r in default]) < 2 * np.mean([r.excess for r in plain]))

    default, plain = runs(range(seeds))
    if not kept(default, plain):
        more = runs(range(seeds, 3 * seeds))
        default, plain = default + more[0], plain + more[1]
    assert kept(default, plain), (default, plain)
    assert min(r.clipped for r in default) > 0.1
    assert min(r.open for r in default) > 0.5


def test_the_default_run_ends_at_the_optimum():
    compare("positives 0.01", 32, 0.05, seeds=1, steps=1000)


@pytest.mark.slow  # six runs of 4,000 steps each
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("kind", "batch", "rate"), PROBLEMS)
def test_clipping_leaves_the_optimum_where_it_is(kind, batch, rate, situation):
    compare(kind, batch, rate, seeds=3, steps=4000, **situation)


@pytest.mark.slow  # six runs of 4,000 steps
def test_weights_from_feedback_alone_leave_the_optimum_where_it_is():
    compare("positives 0.01", 32, 0.05, seeds=3, steps=4000, score_every=None)


@pytest.mark.parametrize("situation", NEVER_CLIPPED)
def test_without_weights_nothing_is_clipped(situation):
    assert train("positives 0.01", 32, 0.05, seed=0, steps=300, **situation).clipped == 0.0


@pytest.mark.slow  # two runs of 4,000 steps each
@pytest.mark.parametrize("situation", NEVER_CLIPPED)
def test_without_weights_the_run_is_plain_sgd(situation):
    one, other = (
        train("positives 0.01", 32, 0.05, seed=0, steps=4000, **situation, **learning)
        for learning in ({}, {"clip_mean_factor": None})
    )
    assert one == other
    assert 0.8 < one.prediction < 1.25


@pytest.mark.slow  # two runs of 4,000 steps
def test_these_problems_notice_a_clipping_that_moves_the_optimum():
    """Uniform draws clipped at about the median of their norms: what this library once did by default."""
    plain = train("positives 0.01", 32, 0.05, seed=0, steps=4000, sampling={"uniform": True})
    clipped = train("positives 0.01", 32, 0.05, seed=0, steps=4000, sampling={"uniform": True}, clip_norm=0.02)
    assert 0.2 < clipped.clipped < 0.6
    assert clipped.prediction < 0.5 < 0.8 < plain.prediction < 1.25
