"""The learning rate of each update: a user's schedule, a cosine, and a factor on top."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import dask_isgd as isgd
from dask_isgd.core import models
from dask_isgd.core.loss import cross_entropy
from dask_isgd.learner.trainer import Trainer

N = 24


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 5, generator=generator), torch.randint(0, 3, (N,), generator=generator)


def trainer(**changes) -> Trainer:
    settings = {"steps": 100, "device": "cpu", "clip_mean_factor": None, "learning_rate": 0.1, **changes}
    return Trainer(models.build(lambda: nn.Linear(5, 3), 1), cross_entropy, isgd.Learning(**settings))


def rates(each, steps):
    x, y = problem()
    found = []
    for k in steps:
        found.append(each.update.optimizer.param_groups[0]["lr"])
        each.step(k, (x,), y, np.ones(N))
    return found


def saved(one, two):
    arrays, odd = models.to_arrays(one.tensors())
    two.restore(models.from_arrays(arrays, odd), json.loads(json.dumps(one.state())))


def cosine(steps, updates):
    return [0.05 * (1 + np.cos(np.pi * t / steps)) for t in updates]


def test_the_rate_falls_along_a_cosine_to_the_end_of_the_run():
    each = trainer(scheduler="cosine", steps=20)
    np.testing.assert_allclose(rates(each, range(20)), cosine(20, range(20)))
    assert each.update.optimizer.param_groups[0]["lr"] == 0.0


def test_a_longer_cosine_is_continued_where_it_would_be():
    one, two, slower = (trainer(scheduler="cosine", steps=steps) for steps in (20, 20, 80))
    rates(one, range(10))
    saved(one, two)
    np.testing.assert_allclose(rates(two, range(10, 20)), cosine(20, range(10, 20)))
    saved(two, slower)
    np.testing.assert_allclose(rates(slower, range(20, 30)), cosine(80, range(20, 30)))


def test_a_cosine_continues_with_another_rate_and_begins_late_in_a_run_that_had_none():
    constant, doubled = trainer(steps=20), trainer(scheduler="cosine", steps=20, learning_rate=0.2)
    assert rates(constant, range(10)) == [0.1] * 10
    saved(constant, doubled)
    np.testing.assert_allclose(rates(doubled, range(10, 20)), [2 * rate for rate in cosine(20, range(10, 20))])
    saved(doubled, constant)
    assert rates(constant, [20]) == [0.1]


@pytest.mark.parametrize(
    ("scheduler", "rate"), [(None, 0.02), (lambda o: torch.optim.lr_scheduler.StepLR(o, 100), 0.1)]
)
def test_another_rate_is_used_after_a_restore_unless_a_schedule_continues(scheduler, rate):
    one, two = trainer(scheduler=scheduler), trainer(scheduler=scheduler, learning_rate=0.02)
    rates(one, [0])
    saved(one, two)
    assert two.update.optimizer.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["SGD", "another"])
def test_a_factor_of_the_rate_is_a_higher_rate_of_this_step_only(optimizer):
    x, y = problem()
    one, two = trainer(optimizer=optimizer, learning_rate=0.1), trainer(optimizer=optimizer, learning_rate=0.15)
    one.update.rate_factor = 1.5
    assert one.update.learning_rate == pytest.approx(0.15)
    for k in range(3):
        assert one.step(k, (x,), y, np.ones(N)) == two.step(k, (x,), y, np.ones(N))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    one.update.rate_factor = 1.0
    assert one.update.learning_rate == one.update.optimizer.param_groups[0]["lr"] == 0.1
