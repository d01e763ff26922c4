"""One call for one batch: the engine is kept, weakly, and never used for another model or loss."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from norms_oracle import cross_entropy, mlp, oracle
from torch import Tensor, nn

from dask_isgd.norms import engine as engines
from dask_isgd.norms import gradient_norms


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models audited."""
    found: list[nn.Module] = []
    right = engines.audit

    def counted(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        found.append(model)
        return right(model, *arguments, **options)

    monkeypatch.setattr(engines, "audit", counted)
    return found


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6), torch.randint(0, 5, (8,))


def halved(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target) / 2


class Losses:
    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target)


class OfTheModel:
    """A loss that refers to the model."""

    model: nn.Module

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target)


def test_later_batches_are_not_audited_again(audits: list[nn.Module]) -> None:
    model = mlp()
    for _ in range(4):
        x, y = batch()
        wanted = oracle(model, cross_entropy, x, y)
        torch.testing.assert_close(gradient_norms(model, cross_entropy, x, y).double(), wanted, rtol=1e-5, atol=0)
    assert len(audits) == 1
    holder = Losses()
    for _ in range(3):
        gradient_norms(model, holder.method, *batch())
    assert len(audits) == 2


def test_another_loss_mode_or_structure_is_audited(audits: list[nn.Module]) -> None:
    model, (x, y) = mlp(), batch()
    whole, half = gradient_norms(model, cross_entropy, x, y), gradient_norms(model, halved, x, y)
    torch.testing.assert_close(whole, 2 * half)
    gradient_norms(model, halved, x, y, train_mode=True)
    model[0].requires_grad_(False)
    fewer = gradient_norms(model, halved, x, y, train_mode=True)
    assert (fewer < half).all()
    assert len(audits) == 4


def test_neither_model_nor_loss_is_kept_alive() -> None:
    model, loss = mlp(), OfTheModel()
    loss.model = model
    gradient_norms(model, loss, *batch())
    watched, function = weakref.ref(model), weakref.ref(loss)
    del model, loss
    gc.collect()
    assert watched() is None
    assert function() is None


def test_an_error_leaves_no_trace(audits: list[nn.Module]) -> None:
    model, (x, y) = mlp(), batch()
    with pytest.raises(RuntimeError):
        gradient_norms(model, cross_entropy, x[:, :3], y)
    torch.testing.assert_close(
        gradient_norms(model, cross_entropy, x, y).double(), oracle(model, cross_entropy, x, y), rtol=1e-5, atol=0
    )
