"""Losses by name: one value per example, equal to torch's, and nothing broadcast by accident."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from dask_isgd.core.loss import LOSSES, bce, cross_entropy, huber, loss_of, mse
from dask_isgd.errors import ConfigError, ModelError

F = nn.functional
TORCH = {mse: F.mse_loss, huber: F.huber_loss, bce: F.binary_cross_entropy_with_logits}


@pytest.mark.parametrize("loss", TORCH)
@pytest.mark.parametrize(("output", "target"), [((5,), (5,)), ((5, 1), (5,)), ((5,), (5, 1)), ((5, 3, 2), (5, 3, 2))])
def test_each_example_has_the_mean_of_its_own(loss, output, target):
    torch.manual_seed(0)
    x, y = 3 * torch.randn(output), torch.randint(0, 2, target)
    found = loss(x, y)
    assert found.shape == (5,)
    for i in range(5):
        torch.testing.assert_close(found[i], TORCH[loss](x[i].reshape(-1), y[i].float().reshape(-1)))


@pytest.mark.parametrize(("output", "target"), [((5, 2), (5,)), ((5, 2, 3), (5, 3, 2)), ((5, 5), (5, 1))])
def test_nothing_is_broadcast(output, target):
    with pytest.raises(ModelError, match="wanted the same shape"):
        mse(torch.zeros(output), torch.zeros(target))


def test_by_name():
    assert {name: loss_of(name) for name in LOSSES} == {**LOSSES, "cross_entropy": None}
    assert loss_of(None) is loss_of(cross_entropy) is None
    assert loss_of("dask_isgd.core.loss:huber") is pickle.loads(pickle.dumps(huber))  # noqa: S301
    own = lambda output, target: output  # noqa: E731
    assert loss_of(own) is own


@pytest.mark.parametrize(
    ("loss", "says"), [("mes", "did you mean 'mse'"), ("nowhere:x", "importable"), (3, "got int, wanted a function")]
)
def test_what_is_no_loss(loss, says):
    with pytest.raises(ConfigError, match=says):
        loss_of(loss)
