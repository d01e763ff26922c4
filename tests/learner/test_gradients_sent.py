"""Gradients that were sent to the other ranks are not changed any more, or it is said."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from dask_isgd.errors import ModelError
from dask_isgd.learner import gradient_sum


def test_a_second_gradient_after_the_first_was_sent_is_refused(monkeypatch):
    monkeypatch.setattr(gradient_sum, "_launched", lambda tensor: object())
    parameter = nn.Parameter(torch.ones(3))
    total = gradient_sum.GradientSum([parameter])
    total.begin()
    (parameter * 2).sum().backward()
    with pytest.raises(ModelError, match=r"second gradient in one backward pass.*use_reentrant=False"):
        (parameter * 3).sum().backward()
    total.begin()  # the next step's backward pass is another one
    (parameter * 2).sum().backward()
    total.close()


class SlowWork:
    def wait(self) -> None:
        time.sleep(0.05)


def test_the_time_in_which_others_are_waited_for_is_known(monkeypatch):
    monkeypatch.setattr(gradient_sum, "_launched", lambda tensor: SlowWork())
    parameter = nn.Parameter(torch.ones(3))
    total = gradient_sum.GradientSum([parameter])
    for steps in (1, 2):
        total.begin()
        time.sleep(0.2)  # its own computing
        (parameter * 2).sum().backward()
        total.finish(torch.tensor(1.0))
        assert 0.1 * steps <= total.waited < 0.2 * steps
    total.close()
