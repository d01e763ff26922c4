"""Optimizers and schedulers as users pass them: their settings reach them or are refused, never ignored."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import dask_isgd as isgd
from dask_isgd.checks.optimizer import check_optimizer, ignored_settings
from dask_isgd.errors import ConfigError, ModelError
from dask_isgd.learner.update import make_optimizer
from dask_isgd.pipelines.recipes import recipe_from_mapping

ADAMW = torch.optim.AdamW


def own(parameters) -> torch.optim.Optimizer:
    return ADAMW(parameters, lr=0.01)


def group(**settings) -> dict:
    return make_optimizer(list(nn.Linear(2, 1).parameters()), isgd.Learning(steps=1, **settings)).param_groups[0]


@pytest.mark.parametrize(
    ("settings", "lr", "momentum"),
    [
        ({}, 0.05, 0.9),
        ({"learning_rate": None}, 0.05, 0.9),
        ({"learning_rate": 0.3}, 0.3, 0.9),
        ({"optimizer": ADAMW}, 1e-3, None),
        ({"optimizer": ADAMW, "learning_rate": 0.3}, 0.3, None),
        ({"optimizer": "torch.optim:SGD", "learning_rate": 0.3, "momentum": 0.5}, 0.3, 0.5),
        ({"optimizer": own}, 0.01, None),
    ],
)
def test_settings_reach_the_optimizer(settings, lr, momentum):
    found = group(**settings)
    assert (found["lr"], found.get("momentum")) == (lr, momentum)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"optimizer": own, "learning_rate": 0.3},
            "Learning.learning_rate: got 0.3 beside .*own, which takes no .*'lr'",
        ),
        ({"optimizer": ADAMW, "momentum": 0.9}, "Learning.momentum: got 0.9 beside .*AdamW, which takes no"),
        (
            {"optimizer": functools.partial(ADAMW, lr=0.1), "learning_rate": 0.3},
            r"got 0.3, and Learning.optimizer sets lr=0.1 itself",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(settings, says):
    (mistake,) = ignored_settings(isgd.Learning(steps=1, **settings))
    assert re.search(says, mistake)


@pytest.mark.parametrize("settings", [{}, {"optimizer": own}, {"optimizer": ADAMW, "learning_rate": 0.3}])
def test_what_is_used_is_not_refused(settings):
    learning = isgd.Learning(steps=1, **settings)
    assert not list(ignored_settings(learning))
    check_optimizer(nn.Linear(2, 1), learning)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"scheduler": lr_scheduler.ReduceLROnPlateau}, ConfigError, "ReduceLROnPlateau needs metrics .*step"),
        ({"scheduler": lambda o: lr_scheduler.StepLR(o)}, ConfigError, "Learning.scheduler: fails .*step_size"),
        ({"scheduler": lambda o: 3}, ConfigError, "Learning.scheduler: returned int"),
        ({"optimizer": torch.optim.LBFGS}, ConfigError, "LBFGS needs closure"),
        ({"optimizer": lambda p: ADAMW(p, lr=-1)}, ConfigError, "Learning.optimizer: fails .*Invalid learning rate"),
        ({"optimizer": lambda p: 3}, ModelError, "optimizer: returned int"),
    ],
)
def test_what_the_learner_cannot_step_is_refused(settings, error, says):
    with pytest.raises(error, match=says):
        check_optimizer(nn.Linear(2, 1), isgd.Learning(steps=1, **settings))


def test_a_scheduler_that_needs_nothing_passes():
    check_optimizer(nn.Linear(2, 1), isgd.Learning(steps=1, scheduler=lambda o: lr_scheduler.StepLR(o, 5)))


def test_a_recipe_with_an_optimizer_does_not_inherit_the_rate_of_another():
    base = recipe_from_mapping({"data": "d", "model": "m:n", "learning": {"steps": 3, "learning_rate": 0.2}})
    given = {"data": "base", "learning": {"optimizer": "torch.optim:AdamW"}}
    learning = recipe_from_mapping(given, {"base": base}).learning
    assert (learning.steps, learning.learning_rate, learning.momentum) == (3, None, None)
