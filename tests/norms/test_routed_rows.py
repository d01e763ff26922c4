"""Rows that an index chose: whose they are is read off the graph of each batch, or the parameter is not read at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms_oracle import cross_entropy, oracle
from torch import Tensor, nn
from torch.nn import functional

from dask_isgd.norms import NormEngine, capture_norms
from dask_isgd.norms.graph_nodes import accumulator, feeds_of
from dask_isgd.norms.row_owners import OwnersOfRows
from dask_isgd.norms.shared_terms import _recorded

SIZE, WIDTH, TOKENS = 6, 8, 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


class Words(nn.Module):
    """Tokens, two layers of something, the mean over positions, a head."""

    def __init__(self, make: Callable[[], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.between = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer, between in zip(self.layers, self.between, strict=True):
            x = torch.tanh(between(x + layer(x)))
        return self.head(x.mean(1))


class Router(nn.Module):
    def __init__(self, experts: int, most: int) -> None:
        super().__init__()
        self.weight, self.most = nn.Parameter(torch.randn(experts, WIDTH)), most

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = functional.linear(x, self.weight).softmax(-1).topk(self.most, -1)
        return scores / scores.sum(-1, keepdim=True), chosen


class Fused(nn.Module):
    """Experts in one tensor each: those that have a token are run one after another, as in Mixtral."""

    def __init__(self, experts: int = 4, most: int = 2) -> None:
        super().__init__()
        self.router = Router(experts, most)
        self.up = nn.Parameter(torch.randn(experts, 2 * WIDTH, WIDTH))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        return self.routed(rows, *self.router(rows)).reshape(x.shape)

    def routed(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        masks = functional.one_hot(chosen, len(self.up)).permute(2, 1, 0)
        for number in masks.sum((-1, -2)).nonzero():
            place, token = torch.where(masks[number[0]])
            gate, up = functional.linear(x[token], self.up[number[0]]).chunk(2, -1)
            out = functional.linear(functional.silu(gate) * up, self.down[number[0]])
            y.index_add_(0, token, out * scores[token, place, None])
        return y


class Grouped(Fused):
    """The same by grouped products of the sorted rows."""

    def order(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, order = torch.sort(chosen)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return numbers, order, inverse

    def routed(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        most = chosen.shape[1]
        numbers, order, inverse = self.order(chosen.reshape(-1))
        ends = torch.histc(numbers.float(), len(self.up), 0, len(self.up) - 1).cumsum(0, dtype=torch.int32)
        if x.dtype == torch.float64:  # which no grouped product is written for
            gate, up = torch.einsum("sd,spd->sp", x[order // most], self.up[numbers]).chunk(2, -1)
            out = torch.einsum("sd,spd->sp", functional.silu(gate) * up, self.down[numbers])
        else:
            gate, up = functional.grouped_mm(x[order // most], self.up.mT, offs=ends).chunk(2, -1)
            out = functional.grouped_mm(functional.silu(gate) * up, self.down.mT, offs=ends)
        out = out * scores.reshape(-1)[order].unsqueeze(-1)
        return out[inverse].view(len(x), most, WIDTH).sum(1)


class SortedTwice(Grouped):
    def order(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, order = torch.sort(chosen)
        return numbers, order, order.argsort()


class Listed(nn.Module):
    """Experts that are modules, with biases; one that has no token is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(6, 1)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, WIDTH)) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores, chosen = self.router(rows)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token = (chosen[:, 0] == number).nonzero().flatten()
            if len(token):
                y = y.index_add(0, token, expert(rows[token]) * scores[token])
        return y.unflatten(0, x.shape[:2])


class Chosen(nn.Module):
    """A layer of the rows that a function of their values chooses, and what is made of its results."""

    def __init__(self, choose: Callable[[Chosen, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.choose = nn.Linear(WIDTH, WIDTH), choose

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self, x)

    def layer(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def masked(layer: Chosen, x: Tensor) -> Tensor:
    mask, y = x[..., 0] > 0, torch.zeros_like(x)
    y[mask] = layer.layer(x[mask])
    return y


def of_single_rows(layer: Chosen, x: Tensor) -> Tensor:
    rows = (x[:, :, 0] > 0.3).flatten().nonzero().flatten()
    chosen = layer.layer(x.flatten(0, 1)[None, rows].reshape(-1, WIDTH))
    return torch.zeros_like(x).flatten(0, 1).index_copy(0, rows, chosen).unflatten(0, x.shape[:2])


def sorted_rows(layer: Chosen, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return layer.layer(x[order])[order.argsort()]


def sorted_then_masked(layer: Chosen, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return masked(layer, x[order])[order.argsort()]


def by_another_inverse(layer: Chosen, x: Tensor) -> Tensor:
    """The inverse comes from a loop in Python: nothing proves that it is one in the next batch."""
    order = x[:, 0, 0].argsort()
    inverse = torch.tensor([order.tolist().index(n) for n in range(len(x))])
    return layer.layer(x[order])[inverse]


def twice_in_order(layer: Chosen, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    inverse = order.argsort()
    return layer.layer(x[order][order])[inverse][inverse]


def mixed_then_chosen(layer: Chosen, x: Tensor) -> Tensor:
    """A product of matrices stands between the index and the layer."""
    order = x[:, 0, 0].argsort()
    rows = x[order]
    return layer.layer((rows @ rows.mT) @ rows)[order.argsort()]


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "experts in one tensor": (Fused, True),
    "grouped products": (Grouped, True),
    "grouped products, sorted twice": (SortedTwice, True),
    "experts in a list": (Listed, True),
    "masked": (lambda: Chosen(masked), True),
    "single rows": (lambda: Chosen(of_single_rows), True),
    "sorted": (lambda: Chosen(sorted_rows), True),
    "sorted, then masked": (lambda: Chosen(sorted_then_masked), False),
    "another inverse": (lambda: Chosen(by_another_inverse), False),
    "twice in order": (lambda: Chosen(twice_in_order), False),
    "mixed, then chosen": (lambda: Chosen(mixed_then_chosen), False),
}
"""Models, and whether all of their parameters are read fast."""


def wrong_by(norms: Tensor, model: nn.Module, tokens: Tensor, y: Tensor) -> float:
    wanted = oracle(model, cross_entropy, tokens, y)
    return float(((norms.double() - wanted).abs() / wanted).max())


@pytest.mark.parametrize("name", MODELS)
def test_routed_rows_in_every_batch(name: str) -> None:
    make, fast = MODELS[name]
    model = Words(make).eval()
    engine = NormEngine(model, cross_entropy)
    served = 0
    for size, length in ((SIZE, 4), (SIZE, 4), (WIDTH, 5), (1, 4), (SIZE, 4)):
        tokens, y = torch.randint(0, TOKENS, (size, length)), torch.randint(0, 5, (size,))
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 2e-5
        inside, reason = captured(model, tokens, y)
        assert fast or inside is None or wrong_by(inside, model, tokens, y) <= 2e-5, reason
        if inside is not None:
            served += 1
            assert wrong_by(inside, model, tokens, y) <= 2e-5
    assert engine.plan is not None
    assert (not engine.plan.fallback) == fast, engine.plan.reasons
    assert served >= 3 or not fast


@pytest.mark.parametrize("make", [Fused, Grouped])
def test_experts_that_are_used_twice(make: Callable[[], nn.Module]) -> None:
    model = Words(make).eval()
    model.layers[1] = model.layers[0]
    engine = NormEngine(model, cross_entropy)
    for size in (SIZE, WIDTH):
        tokens, y = torch.randint(0, TOKENS, (size, 4)), torch.randint(0, 5, (size,))
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 2e-5
        inside, reason = captured(model, tokens, y)
        assert inside is not None, reason
        assert wrong_by(inside, model, tokens, y) <= 2e-5
    assert engine.plan is not None
    assert not engine.plan.fallback


def captured(model: nn.Module, tokens: Tensor, y: Tensor) -> tuple[Tensor | None, str]:
    with capture_norms(model) as capture:
        cross_entropy(model(tokens), y).sum().backward()
    return capture.norms(scale=torch.ones(len(y))), capture.reason


ROWS, MASK = torch.tensor([5, 0, 5, 11, 2]), torch.arange(12).view(3, 4) % 3 > 0
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.flatten(0, 1)[ROWS],
    "a mask": lambda t: t[MASK],
    "a mask of images": lambda t: t.unflatten(2, (1, 2))[MASK][:, 0],
    "rows behind a dimension of one": lambda t: t.flatten(0, 1)[None, ROWS].reshape(-1, 2),
    "examples": lambda t: t[torch.tensor([2, 0, 0])].flatten(1),
    "rows of rows": lambda t: t.flatten(0, 1)[ROWS][torch.tensor([3, 1])].unsqueeze(0),
    "none": lambda t: t[MASK & ~MASK],
}


@pytest.mark.parametrize("name", MOVES)
def test_owners_are_where_the_rows_are(name: str) -> None:
    """What moves rows moves the numbers of their examples in the same way."""
    x = torch.randn(3, 4, 2, requires_grad=True)
    moved = MOVES[name](torch.tanh(x))
    scale = torch.ones(moved.shape[-1], requires_grad=True)
    found = OwnersOfRows(3).at((moved * scale).grad_fn, 1)
    assert found is not None
    wanted = MOVES[name](torch.arange(3)[:, None, None].expand(3, 4, 2))
    assert torch.equal(found.owners.expand(wanted.shape), wanted)


def test_rows_that_a_product_has_mixed_have_no_owners() -> None:
    x, scale = torch.randn(3, 4, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    mixed = torch.tanh(x)[torch.tensor([2, 0])].transpose(0, 1)
    assert OwnersOfRows(3).at((mixed * scale).grad_fn, 1) is None


def test_nothing_is_remembered_of_the_rows_of_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit sees tokens in order; the next batch is in reverse: the owners must be those of its own index."""
    model = Words(lambda: Chosen(sorted_rows), 1).eval()
    with torch.no_grad():
        model.table.weight[:, 0] = torch.arange(TOKENS)
    y = torch.randint(0, 5, (SIZE,))
    forwards = torch.arange(SIZE)[:, None].repeat(1, 3)
    engine = NormEngine(model, cross_entropy)
    engine(forwards, y)
    engine(forwards, y)  # the second batch is checked; the next one is not
    mismatch: Any = NormEngine._mismatch
    checks: list[int] = []
    monkeypatch.setattr(NormEngine, "_mismatch", lambda self, *given: checks.append(1) or mismatch(self, *given))
    backwards = forwards.flip(0)
    assert wrong_by(engine(backwards, y)[0], model, backwards, y) <= 1e-5
    assert not checks


class OrderedTwice(nn.Module):
    """A layer that is used twice on ordered rows: before its second use, a softmax hides the order in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        rows = x[order]
        for _ in range(2):
            rows = torch.softmax(rows * self.scale, -1)
        return self.head(x + rows[order.argsort()])


def test_a_second_use_behind_an_operation_that_hides_the_order_is_not_trusted():
    model = OrderedTwice()
    engine = NormEngine(model, cross_entropy)
    targets = torch.arange(SIZE) % 5
    for step in range(4):  # in order at first, which is what the audit sees
        inputs = torch.randn(SIZE, WIDTH)
        inputs[:, 0] = torch.arange(SIZE) if step == 0 else torch.randperm(SIZE)
        norms, _ = engine(inputs, targets)
        torch.testing.assert_close(norms.double(), oracle(model, cross_entropy, inputs, targets), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("uses", "recorded"), [(1, True), (2, False)])
def test_every_meeting_has_to_record_the_index(uses, recorded):
    scale, rows = torch.rand(WIDTH, requires_grad=True), torch.randn(SIZE, WIDTH, requires_grad=True)
    rows = (rows * 1.0)[torch.randperm(SIZE)]
    for _ in range(uses):
        rows = torch.softmax(rows * scale, -1)
    leaf = accumulator(scale)
    keys = _recorded(leaf, feeds_of([rows.sum()]), frozenset([(("Mul", 1),)]), SIZE)
    assert bool(keys) == recorded
