"""Norms out of a training step: those of the engine, and the training the same to the bit."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from norms_oracle import CASES, cross_entropy, mlp, oracle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dask_isgd.errors import ModelError
from dask_isgd.norms import NormEngine, capture_norms

SIZE = 10
FAST = [name for name, case in CASES.items() if (case.fast if case.captured is None else case.captured)]
SLOW = [name for name in CASES if name not in FAST]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2)


@pytest.mark.parametrize("name", FAST)
def test_norms_are_unscaled_and_exact(name: str) -> None:
    case = CASES[name]
    model, x, y = case.model().eval(), case.inputs(SIZE), torch.randint(0, 5, (SIZE,))
    scale = torch.rand(SIZE) * 3 / SIZE + 0.01
    wanted = oracle(model, cross_entropy, x, y)
    for _ in range(2):  # with the audit, and after it
        with capture_norms(model) as capture:
            torch.dot(cross_entropy(model(x.clone()), y), scale).backward()
        norms = capture.norms(scale=scale)
        assert norms is not None
        assert norms.dtype == torch.float32
        assert float(((norms.double() - wanted).abs() / wanted).max()) <= 1e-5


@pytest.mark.parametrize("name", SLOW)
def test_none_if_the_backward_pass_does_not_yield_them(name: str) -> None:
    case = CASES[name]
    model, x, y = case.model(), case.inputs(SIZE), torch.randint(0, 5, (SIZE,))
    for _ in range(2):
        with capture_norms(model) as capture:
            cross_entropy(model(x), y).sum().backward()
        assert capture.norms(scale=torch.ones(SIZE)) is None


def train(model: nn.Module, x: Tensor, y: Tensor, *, captured: bool) -> list[Tensor]:
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scale = torch.rand(SIZE) / SIZE
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        if captured:
            with capture_norms(model) as capture:
                torch.dot(cross_entropy(model(x.clone()), y), scale).backward()
            capture.norms(scale=scale)
        else:
            torch.dot(cross_entropy(model(x.clone()), y), scale).backward()
        optimizer.step()
    return [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_to_the_bit(name: str) -> None:
    case = CASES[name]
    plain = case.model().train()
    watched = copy.deepcopy(plain)
    x, y = case.inputs(SIZE), torch.randint(0, 5, (SIZE,))
    for a, b in zip(train(plain, x, y, captured=False), train(watched, x, y, captured=True), strict=True):
        assert torch.equal(a, b)


def test_dropout_in_training_norms_are_those_of_the_mask_drawn() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 5)).train()
    x, y, scale = torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,)), torch.full((SIZE,), 0.1)
    engine = NormEngine(model, cross_entropy, train_mode=True)
    for _ in range(2):
        wanted, _ = engine(x, y)  # draws from a copy of the random state
        with capture_norms(model) as capture:
            torch.dot(cross_entropy(model(x.clone()), y), scale).backward()
        norms = capture.norms(scale=scale)
        assert norms is not None
        torch.testing.assert_close(norms, wanted)


def raise_after(output: Tensor) -> None:
    raise ModelError("raised")


def test_norms_inside_the_context_and_no_hooks_left() -> None:
    model, x, y = mlp(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    with capture_norms(model) as capture:
        cross_entropy(model(x), y).mean().backward()
        inside = capture.norms(scale=torch.full((SIZE,), 1 / SIZE))
    outside = capture.norms(scale=torch.full((SIZE,), 1 / SIZE))
    assert inside is not None
    assert outside is not None
    assert torch.equal(inside, outside)
    with pytest.raises(ModelError, match="raised"), capture_norms(model):
        raise_after(model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_forward_passes_no_backward_and_another_batch_give_none() -> None:
    model, x, y = mlp(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    ones = torch.ones(SIZE)
    with capture_norms(model) as capture:
        (cross_entropy(model(x), y) + cross_entropy(model(-x), y)).sum().backward()
    assert capture.norms(scale=ones) is None
    with capture_norms(model) as capture:
        model(x)
    assert capture.norms(scale=ones) is None
    with capture_norms(model) as capture:
        cross_entropy(model(x), y).sum().backward()
    assert capture.norms(scale=ones[1:]) is None
    with capture_norms(model) as capture:
        pass
    assert capture.norms(scale=ones) is None


class SharedParts(nn.Module):
    """Tokens with a class token, scales, positions of one make, and torch's encoder: what transformers are made of."""

    def __init__(self, positions: str, *, batch_first: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.table, self.positions, self.batch_first = nn.Embedding(9, 8), positions, batch_first
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.rand(8))
        shape = {"parameter": (5, 8), "with a leading one": (1, 5, 8), "attention": (1, 1, 8)}.get(positions, (1, 1, 8))
        self.places = nn.Parameter(torch.randn(shape))
        self.numbers = nn.Embedding(5, 8)
        self.distances, self.value = nn.Embedding(9, 2), nn.Linear(8, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(tokens), -1, -1), self.table(tokens)], 1) * self.scale
        order = torch.arange(5)
        x = x + self.places
        if self.positions == "embedding":
            x = x + self.numbers(order)
        if self.positions == "embedding of (1, T)":
            x = x + self.numbers(order[None])
        if self.positions == "attention":  # a bias by distance, shared by two layers
            bias = self.distances(order[:, None] - order + 4).permute(2, 0, 1).unsqueeze(0)
            for _ in range(2):
                parts = x.unflatten(2, (2, 4)).transpose(1, 2)
                mixed = (parts @ parts.mT + bias).softmax(-1) @ self.value(x).unflatten(2, (2, 4)).transpose(1, 2)
                x = x + mixed.transpose(1, 2).flatten(2)
        if self.batch_first:
            return self.head(self.encoder(x).mean(1))
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


SHARED = ["parameter", "with a leading one", "embedding", "embedding of (1, T)", "attention"]


@pytest.mark.parametrize(
    ("positions", "batch_first"), [*((make, True) for make in SHARED), ("parameter", False), ("attention", False)]
)
def test_transformers_yield_norms_inside_the_step(positions: str, batch_first: bool) -> None:
    model = SharedParts(positions, batch_first=batch_first).train()
    y, scale = torch.randint(0, 5, (SIZE,)), torch.rand(SIZE) + 0.1
    for step in range(3):
        tokens = torch.randint(0, 9, (SIZE, 4))
        torch.manual_seed(step)
        losses = cross_entropy(model(tokens), y)
        rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True, allow_unused=True) for v in losses]
        wanted = torch.stack([torch.cat([g.flatten() for g in row if g is not None]).double().norm() for row in rows])
        torch.manual_seed(step)
        with capture_norms(model) as capture:
            torch.dot(cross_entropy(model(tokens), y), scale).backward()
        norms = capture.norms(scale=scale)
        assert norms is not None, capture.reason
        assert float(((norms.double() - wanted).abs() / wanted).max()) <= 1e-5


@pytest.mark.parametrize("positions", ["embedding", "attention"])
def test_transformers_train_the_same_to_the_bit(positions: str) -> None:
    plain = SharedParts(positions).train()
    watched = copy.deepcopy(plain)
    x, y = torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
    for a, b in zip(train(plain, x, y, captured=False), train(watched, x, y, captured=True), strict=True):
        assert torch.equal(a, b)


def test_steps_without_norms_are_reported_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = nn.Sequential(nn.Bilinear(3, 3, 5)), torch.randn(SIZE, 3), torch.randint(0, 5, (SIZE,))
    model.forward = lambda x: model[0](x, x)  # type: ignore[method-assign]
    for _ in range(3):
        with capture_norms(model) as capture:
            cross_entropy(model(x), y).sum().backward()
        assert capture.norms(scale=torch.ones(SIZE)) is None
        assert not capture.possible
        assert "0.weight: no rule for Bilinear" in capture.reason
    (record,) = caplog.records
    assert "yield no norms" in record.message


class _Synchronised(TorchDispatchMode):
    """Fails if an operation must know a value, or the number of results, on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.rpartition("::")[2]
        assert not name.startswith(("_local_scalar_dense", "unique", "_unique", "nonzero", "masked_select")), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", SHARED)
def test_a_step_does_not_wait_for_the_device(positions: str) -> None:
    model, y = SharedParts(positions).train(), torch.randint(0, 5, (SIZE,))
    for step in range(4):
        tokens = torch.randint(0, 9, (SIZE, 4))
        with nullcontext() if step < 2 else _Synchronised(), capture_norms(model) as capture:  # audit, first check
            cross_entropy(model(tokens), y).sum().backward()
            assert capture.norms(scale=torch.ones(SIZE)) is not None
