"""Each rule against autograd, and what a new family needs: one file, one decorator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from norms_oracle import cross_entropy, oracle
from torch import Tensor, nn

from dask_isgd.norms import RULES, NormEngine, register_rule
from dask_isgd.norms.rules import Saved, linear
from dask_isgd.norms.rules.linear import product_norms


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize(("length", "inputs", "outputs"), [(1, 1, 1), (3, 40, 30), (50, 4, 5), (4, 8, 8)])
@pytest.mark.parametrize("workspace", [1, 1 << 23])
def test_gram_and_direct_form(
    size: int, length: int, inputs: int, outputs: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "WORKSPACE", workspace)
    torch.manual_seed(0)
    x, d = torch.randn(size, length, inputs), torch.randn(size, length, outputs)
    wanted = torch.einsum("bti,bto->boi", x.double(), d.double()).square().sum((1, 2))
    torch.testing.assert_close(product_norms(x, d).double(), wanted.sqrt(), rtol=1e-5, atol=1e-6)


class Scale(nn.Module):
    """A layer of the user's own: a factor per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ScaleRule:
    parameters = frozenset({"factor"})

    def save(self, module: nn.Module, x: Tensor, unshared: frozenset[str], shared: frozenset[str]) -> Saved:
        return (x,)

    def norms(self, module: nn.Module, saved: Saved, grad: Tensor, names: frozenset[str]) -> Tensor:
        return (saved[0] * grad).norm(dim=1)

    def gradient(self, module: nn.Module, saved: Saved, grad: Tensor, name: str) -> Tensor:
        return saved[0] * grad


@pytest.fixture
def _scale_rule() -> Iterator[None]:
    register_rule(Scale)(ScaleRule)
    yield
    del RULES[Scale]


@pytest.mark.usefixtures("_scale_rule")
@pytest.mark.parametrize("twice", [False, True])
def test_a_rule_of_the_users(twice: bool) -> None:
    torch.manual_seed(0)
    scale = Scale()
    model = nn.Sequential(scale, nn.Linear(6, 6), nn.Tanh(), scale if twice else nn.Identity(), nn.Linear(6, 5))
    x, y = torch.randn(9, 6), torch.randint(0, 5, (9,))
    engine = NormEngine(model, cross_entropy)
    norms, _ = engine(x, y)
    assert engine.plan is not None
    assert not engine.plan.fallback
    wanted = oracle(model, cross_entropy, x, y)
    assert float(((norms.double() - wanted).abs() / wanted).max()) <= 1e-5


def test_a_subclass_is_not_its_parent() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model, x, y = nn.Sequential(Doubled(6, 5)), torch.randn(9, 6), torch.randint(0, 5, (9,))
    engine = NormEngine(model, cross_entropy)
    norms, _ = engine(x, y)
    wanted = oracle(model, cross_entropy, x, y)
    assert float(((norms.double() - wanted).abs() / wanted).max()) <= 1e-5
    assert engine.plan is not None
    assert not engine.plan.layers
