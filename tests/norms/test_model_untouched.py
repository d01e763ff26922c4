"""The user's model is unchanged after success and after an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms_oracle import CASES, cross_entropy
from torch import Tensor, nn

from dask_isgd.norms import gradient_norms


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a pass could change."""
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "parameters": [(id(p), p._version, p.detach().clone()) for p in model.parameters()],
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "hooks": [
            [dict(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for m in model.modules()
        ],
        "parameter hooks": [dict(p._backward_hooks or {}) for p in model.parameters()],
        "random": torch.get_rng_state(),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class Counting(nn.Module):
    """Writes to its buffers, in place and by a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layer(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (CASES["MLP"].model, (6,)),
    "partly frozen": (CASES["bias frozen"].model, (6,)),
    "dropout": (CASES["dropout in eval mode"].model, (6,)),
    "batch normalisation": (CASES["batch normalisation in eval mode"].model, (6,)),
    "convolution": (CASES["convolution"].model, (2, 6, 6)),
    "a loop": (CASES["control flow on values"].model, (6,)),
    "a hook of the user's": (CASES["a hook of the user's"].model, (6,)),
    "buffers that change": (Counting, (6,)),
}


def failing(output: Tensor, target: Tensor) -> Tensor:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, losses: Tensor) -> Tensor:
            return losses.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise ArithmeticError("in backward")

    return Fails.apply(cross_entropy(output, target))


def raising(output: Tensor, target: Tensor) -> Tensor:
    raise ArithmeticError("in the loss")


@pytest.mark.parametrize("mixed_modes", [False, True])
@pytest.mark.parametrize("method", ["exact", "bound", "loss"])
@pytest.mark.parametrize("loss", [cross_entropy, failing, raising])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name: str, loss: Any, method: str, mixed_modes: bool) -> None:
    torch.manual_seed(3)
    build, shape = MODELS[name]
    model, x, y = build(), torch.randn(8, *shape), torch.randint(0, 5, (8,))
    cross_entropy(model.eval()(x), y).sum().backward()
    model.train()
    if mixed_modes:
        next(iter(model.children())).eval()
    hooked = next(p for p in model.parameters() if p.requires_grad)
    called: list[Tensor] = []
    hooked.register_hook(called.append)
    before, x_before = snapshot(model), x.clone()
    if loss is cross_entropy or (loss is failing and method == "loss"):
        gradient_norms(model, loss, x, y, method=method)
    else:
        with pytest.raises(ArithmeticError):
            gradient_norms(model, loss, x, y, method=method)
    after = snapshot(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert torch.equal(x, x_before)
    assert called == []
    cross_entropy(model.eval()(x), y).sum().backward()
    assert len(called) == 1, "the user's hook works again"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context: Any) -> None:
    torch.manual_seed(3)
    model, y = CASES["three dimensions"].model(), torch.randint(0, 5, (8,))
    x = torch.randn(8, 3, 6)
    wanted = gradient_norms(model, cross_entropy, x, y)
    with context():
        got = gradient_norms(model, cross_entropy, x.clone(), y.clone())
    torch.testing.assert_close(got, wanted)
