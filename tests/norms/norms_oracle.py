"""The table of models the norms are proved on, and the oracle: autograd, one example at a time, float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_isgd.norms import RULES
from dask_isgd.norms.tensor_trees import call, take, tensors


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def oracle(model: nn.Module, loss: Any, inputs: Any, targets: Any, *, train_mode: bool = False) -> Tensor:
    """||∂L_n/∂θ||₂ by the definition: (B,) float64."""
    model = copy.deepcopy(model).double().train(train_mode)
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for n in range(len(tensors(inputs)[0])):
        row = slice(n, n + 1)
        double = [t.double() if t.is_floating_point() else t for t in tensors(take(inputs, row))]
        arguments = iter(double)
        rows = _rebuilt(inputs, arguments)
        value = loss(call(model, rows), take(targets, row))[0]
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        norms.append(torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())
    return torch.stack(norms)


def _rebuilt(inputs: Any, leaves: Any) -> Any:
    if isinstance(inputs, Tensor):
        return next(leaves)
    if isinstance(inputs, dict):
        return {key: next(leaves) for key in inputs}
    return tuple(next(leaves) for _ in inputs)


class Tied(nn.Module):
    """One Linear used twice, and an output layer that shares its weight with the input layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        self.last.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.middle(torch.tanh(x))))


class BehindTheBack(nn.Module):
    """A layer's weight used through the layer and through F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(functional.linear(torch.tanh(self.layer(x)), self.layer.weight)))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.body(self.table(tokens))).mean(1), self.table.weight)


class RawParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((6,), 0.7))
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


class Transposed(nn.Module):
    """A Linear whose input has positions first: its output does not have the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


class Merged(nn.Module):
    """A Linear whose input has batch and positions in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.reshape(-1, 6))).reshape(len(x), -1, 6).mean(1))


class Flipped(nn.Module):
    """A Linear whose rows are the examples in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.flip(0))).flip(0))


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.layer(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Stubborn(nn.Module):
    """Control flow on values, which vmap cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.bilinear(x, x, self.matrix) if float(x.sum()) > -1e9 else x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) + torch.tanh(self.b(right))


class Hooked(nn.Module):
    """The user's own forward hook doubles what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
        self.layer.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 9, bias=bias), activation(), nn.Linear(9, 8, bias=bias), activation(), nn.Linear(8, 5, bias=bias)
    )


def inplace() -> nn.Module:
    return nn.ReLU(inplace=True)


def positions(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), activation(), nn.Linear(9, 8), activation(), nn.Flatten(), nn.Linear(3 * 8, 5)
    )


@dataclass(frozen=True)
class Case:
    """A model, the shape of an example of its input, and how its norms are computed."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...] = (6,)
    fast: bool = True
    """No parameter needs the fallback."""
    captured: bool | None = None
    """(None: as ``fast``.) An ordinary training step holds its norms."""
    tokens: bool = False

    def inputs(self, size: int) -> Tensor:
        if self.tokens:
            return torch.randint(0, 9, (size, *self.shape))
        return torch.randn(size, *self.shape)


CASES: dict[str, Case] = {
    "MLP": Case(mlp),
    "MLP without biases": Case(lambda: mlp(bias=False)),
    "in-place activation": Case(lambda: mlp(inplace)),
    "one layer": Case(lambda: nn.Linear(6, 5)),
    "dropout in eval mode": Case(lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 5))),
    "three dimensions": Case(lambda: positions(nn.ReLU), (3, 6)),
    "three dimensions, in place": Case(lambda: positions(inplace), (3, 6)),
    "three dimensions, long (direct form)": Case(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 40, 5)), (40, 6)
    ),
    "four dimensions": Case(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 3 * 4, 5)), (2, 3, 6)
    ),
    "first layer frozen": Case(lambda: frozen(mlp(), "0.weight", "0.bias")),
    "weight frozen": Case(lambda: frozen(mlp(), "2.weight")),
    "bias frozen": Case(lambda: frozen(mlp(), "2.bias", "4.bias")),
    "weight frozen, three dimensions": Case(lambda: frozen(positions(nn.ReLU), "0.weight", "2.bias"), (3, 6)),
    "tied layers": Case(Tied),
    "tied layers, three dimensions": Case(lambda: nn.Sequential(Tied(), nn.Flatten(), nn.Linear(24, 5)), (3, 6)),
    "a hook of the user's": Case(Hooked),
    "a weight used behind the back": Case(BehindTheBack),
    "a raw parameter": Case(RawParameter),
    "positions first": Case(Transposed, (3, 6)),
    "batch and positions merged": Case(Merged, (3, 6)),
    "examples in reverse": Case(Flipped, fast=False),
    "an input changed in place": Case(WritesIntoItsInput),
    "convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 5)), (2, 6, 6)
    ),
    "batch normalisation in eval mode": Case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    ),
    "group normalisation": Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 5))),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5)), (3,), tokens=True),
    "tied embedding": Case(TiedEmbedding, (4,), tokens=True),
    "attention": Case(Attention, (4, 8)),
    "weight normalisation": Case(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 5)),
    ),
    "control flow on values": Case(Stubborn, fast=False),
    "a checkpointed layer": Case(lambda: Checkpointed()),
}


class Checkpointed(nn.Module):
    """A layer that runs a second time in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.head(torch.tanh(checkpoint(self.inner, x, use_reentrant=False)))


def layer_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """∂<output, grad>/∂θ of each example and parameter of one layer: (B, *shape) float64."""
    module = copy.deepcopy(module).double()
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in module.named_parameters()}
    for n in range(len(x)):
        one = x[n : n + 1].double() if x.is_floating_point() else x[n : n + 1]
        gradients = torch.autograd.grad(module(one), list(module.parameters()), grad[n : n + 1].double())
        for name, gradient in zip(rows, gradients, strict=True):
            rows[name].append(gradient.to_dense() if gradient.is_sparse else gradient)
    return {
        name: torch.stack(list_) if list_ else torch.zeros(0, *module.get_parameter(name).shape).double()
        for name, list_ in rows.items()
    }


def check_rule(module: nn.Module, x: Tensor, rule: Any = None) -> None:
    """A layer's rule against autograd: every set of parameters it may serve, norms and gradients."""
    rule = RULES[type(module)] if rule is None else rule
    with torch.no_grad():
        grad = torch.randn_like(module(x))
    wanted = layer_gradients(module, x, grad)
    assert wanted.keys() <= rule.parameters
    for names in ({*wanted}, *({name} for name in wanted)):
        asked = frozenset(names)
        got = rule.norms(module, rule.save(module, x, asked, frozenset()), grad, asked)
        squares = torch.zeros(len(x)).double()
        for name in names:
            squares += wanted[name].square().flatten(1).sum(1)
        assert got.shape == (len(x),)
        torch.testing.assert_close(got.double(), squares.sqrt(), rtol=1e-5, atol=1e-6)
    for name, gradient in wanted.items():
        saved = rule.save(module, x, frozenset(), frozenset({name}))
        got = rule.gradient(module, saved, grad, name)
        scale = float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-5 * scale)
