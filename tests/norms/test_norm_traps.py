"""Models that once crashed, were destroyed, or had wrong norms in later batches: exact, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from norms_oracle import cross_entropy, oracle
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dask_isgd.config import Learning
from dask_isgd.errors import ModelError
from dask_isgd.learner.trainer import Trainer
from dask_isgd.norms import NormEngine, capture_norms, gradient_norms

SIZE = 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(6)


def wrong_by(norms: Tensor, model: nn.Module, inputs: Any, targets: Any, loss: Any = cross_entropy) -> float:
    wanted = oracle(model, loss, inputs, targets)
    return float(((norms.double() - wanted).abs() / wanted).max())


def captured(model: nn.Module, inputs: Any, targets: Any) -> Tensor | None:
    """The norms of a training step, in the model's current mode."""
    with capture_norms(model) as capture:
        cross_entropy(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets).sum().backward()
    return capture.norms(scale=torch.ones(len(targets)))


class TwoNames(nn.Module):
    """One module without a rule, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Bilinear(6, 6, 5)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x, x) + torch.tanh(self.b(x, -x))


def used_twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 5))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [TwoNames, used_twice])
def test_a_module_under_two_names_survives(build: Callable[[], nn.Module], autocast: bool) -> None:
    model, x, y = build(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    before = dict(model.named_parameters(remove_duplicate=False))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        norms = gradient_norms(model, cross_entropy, x, y)
        inside = captured(model.eval(), x, y)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert wrong_by(norms, model, x, y) <= (0.05 if autocast else 1e-5)
    if build is used_twice:
        assert inside is not None
        torch.testing.assert_close(inside, norms)
    model.state_dict()
    cross_entropy(model(x), y).sum().backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("normalised", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weight_normalisation_old_and_new(normalised: Callable[[nn.Module], nn.Module]) -> None:
    body = normalised(nn.Conv1d(6, 8, 3)), nn.Tanh(), nn.Flatten(), normalised(nn.Linear(32, 5))
    model, x, y = nn.Sequential(*body), torch.randn(SIZE, 6, 6), torch.randint(0, 5, (SIZE,))
    weight = model[0].weight
    engine = NormEngine(model, cross_entropy)
    assert ((engine(x, y)[0].double() - _by_hand(model, x, y)).abs() / _by_hand(model, x, y)).max() <= 1e-5
    assert engine.plan is not None
    assert not [name for name in engine.plan.copies if "weight" in name]
    inside = captured(model, x, y)
    assert inside is not None, "read off the graph, past the node that normalises"
    assert ((inside.double() - _by_hand(model, x, y)).abs() / _by_hand(model, x, y)).max() <= 1e-5
    assert type(model[0].weight) is type(weight), "no dead tensor stays behind"


def _by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The oracle for models that cannot be copied."""
    losses = cross_entropy(model(x), y)
    rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in losses]
    return torch.stack([torch.cat([part.flatten() for part in row]).double().norm() for row in rows])


class PositionsBeforeAttention(nn.Module):
    def __init__(self, make: str) -> None:
        super().__init__()
        self.table, self.make = nn.Embedding(9, 8), make
        if make == "embedding":
            self.places: Any = nn.Embedding(4, 8)
        else:
            self.places = nn.Parameter(torch.randn((1, 4, 8) if make == "leading one" else (4, 8)))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(4)[None]) if self.make == "embedding" else self.places
        return self.head(self.layer(self.table(tokens) + places).mean(1))


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("make", ["plain", "leading one", "embedding"])
def test_positions_before_attention(make: str, train_mode: bool) -> None:
    model, y = PositionsBeforeAttention(make), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy, train_mode=train_mode)
    for _ in range(2):
        tokens = torch.randint(0, 9, (SIZE, 4))
        norms, _ = engine(tokens, y)
        if not train_mode:
            assert wrong_by(norms, model, tokens, y) <= 1e-5
        assert torch.isfinite(norms).all()
    captured(model.train(), tokens, y)


class Unpadded(nn.Module):
    """Computes at the valid tokens only: ``y[mask] = f(x[mask])``."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        mask, x = tokens > 0, self.table(tokens)
        y = torch.zeros_like(x)
        y[mask] = torch.tanh(self.middle(x[mask]))
        return self.head(y.sum(1))


class UnpaddedTokens(Unpadded):
    """The same, before the embedding, by numbers of the tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        where = (tokens > 0).flatten().nonzero().flatten()
        x = torch.tanh(self.middle(self.table(tokens.flatten()[where])))
        y = torch.zeros(tokens.numel(), 6, dtype=x.dtype).index_copy(0, where, x)
        return self.head(y.unflatten(0, tokens.shape).sum(1))


class Ordered(Unpadded):
    """Computes the rows in another order: by their lengths, in torch or in Python, or by a gate."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.gate = by, nn.Linear(6, 1)
        self.cells = nn.GRU(6, 6, batch_first=True) if by == "packed" else None

    def forward(self, tokens: Tensor) -> Tensor:
        x, lengths = self.table(tokens), (tokens > 0).sum(1)
        scores = self.gate(x.mean(1)).flatten()
        order = (scores if self.by == "gate" else -lengths).argsort(stable=True)
        inverse = order.argsort()
        if self.by == "Python":
            order = torch.tensor(sorted(range(len(x)), key=(-lengths).tolist().__getitem__))
            inverse = order.argsort()
        if self.by in ("unbound", "embedding"):
            x = self._in_order(x, order, -lengths)
            y = self._in_order(torch.tanh(self.middle(x)), inverse, -lengths, back=True)
            return self.head(y.sum(1) * torch.sigmoid(scores[:, None]))
        if self.cells is not None:
            packed = nn.utils.rnn.pack_padded_sequence(x[order], lengths[order], batch_first=True)
            y = nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True, total_length=x.shape[1])[0]
        else:
            y = torch.tanh(self.middle(x[order]))
        return self.head((y[inverse]).sum(1) * torch.sigmoid(scores[:, None]))

    def _in_order(self, x: Tensor, index: Tensor, keys: Tensor, *, back: bool = False) -> Tensor:
        """Gather as some libraries do: by an embedding, or by a list of rows that are made before their order is."""
        if self.by == "embedding":
            return functional.embedding(index, x.flatten(1)).view_as(x)
        rows, values = x.unbind(), keys.tolist()
        places = sorted(range(len(rows)), key=values.__getitem__)
        return torch.stack([rows[places.index(n) if back else places[n]] for n in range(len(rows))])


class Routed(nn.Module):
    """Each token goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.router, self.head = nn.Embedding(9, 6), nn.Linear(6, 2), nn.Linear(6, 5)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).flatten(0, 1)
        gates = self.router(x).softmax(1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(gates.argmax(1) == number)
            y = y.index_add(0, rows, torch.tanh(expert(x[rows])) * gates[rows, number, None])
        return self.head(y.unflatten(0, tokens.shape).mean(1))


RAGGED: dict[str, Callable[[], nn.Module]] = {
    "tokens without padding": Unpadded,
    "numbers of the tokens": UnpaddedTokens,
    "sorted by length": lambda: Ordered("length"),
    "sorted by Python": lambda: Ordered("Python"),
    "sorted as a list of rows": lambda: Ordered("unbound"),
    "sorted by an embedding": lambda: Ordered("embedding"),
    "packed": lambda: Ordered("packed"),
    "sorted by a gate": lambda: Ordered("gate"),
    "routed to experts": Routed,
}


def ragged(lengths: Tensor) -> Tensor:
    tokens = torch.randint(1, 9, (len(lengths), 6))
    return tokens.masked_fill_(torch.arange(6) >= lengths[:, None], 0)


@pytest.mark.parametrize("name", RAGGED)
def test_later_batches_with_other_lengths(name: str) -> None:
    model, y = RAGGED[name]().eval(), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    for lengths in (torch.full((SIZE,), 6), torch.arange(SIZE) % 6 + 1, torch.randint(1, 7, (SIZE,))):
        tokens = ragged(lengths)
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 1e-5
        inside = captured(model, tokens, y)
        if inside is not None:
            assert wrong_by(inside, model, tokens, y) <= 1e-5
    assert engine.plan is not None
    if name in ("tokens without padding", "numbers of the tokens", "routed to experts"):
        assert not [name for name in engine.plan.fallback if "head" in name], "put back where they came from"
    lengths = torch.tensor([6, 1, 1, 1, 1, 1, 1, 1, 2])  # as many tokens as a multiple of the batch, unevenly
    tokens = ragged(lengths)
    assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 1e-5


@pytest.mark.parametrize("name", RAGGED)
def test_rows_in_the_order_of_the_audit_prove_nothing_of_the_next_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of single examples would find most faults out, some batches later: here it is not made."""
    model, y = RAGGED[name]().eval(), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    engine(ragged(torch.full((SIZE,), 6)), y)
    monkeypatch.setattr(NormEngine, "_mismatch", lambda *_: None)
    for _ in range(3):
        tokens = ragged(torch.randint(1, 7, (SIZE,)))
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 1e-5


class LastToken(Unpadded):
    """Reads the row of each example's last token: the rows stay whose they are."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.middle(self.table(tokens)))
        return self.head(x[torch.arange(len(x)), (tokens > 0).sum(1) - 1])


def test_an_index_that_leaves_the_rows_in_place_is_trusted() -> None:
    model, y = LastToken(), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    for _ in range(2):
        tokens = ragged(torch.randint(1, 7, (SIZE,)))
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 1e-5
    assert engine.plan is not None
    assert not engine.plan.fallback


class BehindTheModule(nn.Module):
    """Uses a layer's weight past the layer, in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.again = nn.Linear(6, 6), nn.Linear(6, 5), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.again:
            y = y + functional.linear(torch.tanh(x), self.layer.weight)
        return self.head(torch.tanh(y))


@pytest.mark.parametrize("train_mode", [False, True])
def test_a_weight_used_past_its_layer_in_some_batches(train_mode: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, y = BehindTheModule().train(train_mode), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy, train_mode=train_mode)
    some = 0
    for number in range(30):
        x, model.again = torch.randn(SIZE, 6), number % 3 == 2
        assert wrong_by(engine(x, y)[0], model, x, y) <= 1e-5
        inside = captured(model, x, y)
        if inside is not None:
            some += 1
            assert wrong_by(inside, model, x, y) <= 1e-5
    assert some >= 8
    assert sum("audit" in record.message for record in caplog.records if "later batch" in record.message) == 1


def test_a_rule_that_is_wrong_in_later_batches_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dask_isgd.norms.rules.linear import LinearRule

    model, x, y = nn.Sequential(nn.Linear(6, 5)), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    engine(x, y)
    right = LinearRule.norms
    monkeypatch.setattr(LinearRule, "norms", lambda *arguments: 1.1 * right(*arguments))
    assert wrong_by(engine(x, y)[0], model, x, y) <= 1e-5, "the second batch is checked"
    assert "later batch" in caplog.text


class Reentrant(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first, self.a, self.b, self.head = first, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else torch.tanh(self.a(x))
        return self.head(torch.tanh(checkpoint(self.b, x, use_reentrant=True)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("first", [False, True])
def test_reentrant_checkpoints_are_refused_by_name(first: bool) -> None:
    model, x, y = Reentrant(first=first), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    with pytest.raises(ModelError, match="use_reentrant=False"):
        gradient_norms(model, cross_entropy, x, y)
    with capture_norms(model) as capture:
        cross_entropy(model(x), y).sum().backward()
    assert capture.norms(scale=torch.ones(SIZE)) is None
    assert "use_reentrant=False" in capture.reason
    assert model.head.weight.grad is not None


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_learner_trains_on_without_norms(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(Reentrant(first=False), cross_entropy, Learning(steps=9, device="cpu"))
    x, y = torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    for step in range(3):
        result = trainer.step(step, (x,), y, np.ones(SIZE), norms=True, measure=True)
        assert result.norms is None
    said = [record.name for record in caplog.records if "use_reentrant=False" in record.message]
    assert sorted(said) == ["dask_isgd.learner.trainer", "dask_isgd.norms"], "each once"


@pytest.mark.parametrize("slow", [nn.PReLU, nn.Identity])
def test_instance_normalisation_with_running_statistics_in_train_mode(slow: Callable[[], nn.Module]) -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, slow(), nn.Flatten(), nn.Linear(64, 5)).train()
    x, y = torch.randn(SIZE, 2, 6, 6), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy, train_mode=True)
    wanted = oracle(model, cross_entropy, x, y, train_mode=True)
    for _ in range(2):
        torch.testing.assert_close(engine(x, y)[0].double(), wanted, rtol=1e-5, atol=0)


class BatchMean(nn.Module):
    """Tokens, dropout, and two per cent of the batch's mean, which no gradient passes."""

    def __init__(self, *, layer: bool) -> None:
        super().__init__()
        self.table, self.head, self.layer = nn.Embedding(9, 6), nn.Linear(6, 5), layer
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).mean(1)
        x = self.dropout(x) if self.layer else functional.dropout(x, 0.1, self.training)
        return self.head(x - 0.02 * x.mean(0).detach())


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("layer", [False, True])
def test_weak_coupling_of_tokens_is_refused(layer: bool, train_mode: bool) -> None:
    model, tokens, y = BatchMean(layer=layer), torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
    with pytest.raises(ModelError, match="couples the examples"):
        gradient_norms(model, cross_entropy, tokens, y, train_mode=train_mode)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_scripted_model_is_refused_by_name() -> None:
    model, x, y = torch.jit.script(nn.Sequential(nn.Linear(6, 5))), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    with pytest.raises(ModelError, match=r"scripted model \(Sequential\)"):
        gradient_norms(model, cross_entropy, x, y)
    with capture_norms(model) as capture:
        cross_entropy(model(x), y).sum().backward()
    assert capture.norms(scale=torch.ones(SIZE)) is None
    assert "scripted" in capture.reason


@pytest.mark.parametrize("part", [False, True])
def test_compiled_models_are_served_as_written(part: bool) -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    compiled = torch.compile(inner, backend="eager")
    model: Any = nn.Sequential(compiled, nn.Linear(6, 5))
    model = model if part else torch.compile(nn.Sequential(inner, nn.Linear(6, 5)), backend="eager")
    x, y = torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    norms, _ = engine(x, y)
    torch.testing.assert_close(norms.double(), _by_hand(model, x, y).double(), rtol=1e-5, atol=0)
    assert engine.plan is not None
    assert not engine.plan.fallback
    with capture_norms(model) as capture:
        cross_entropy(model(x), y).sum().backward()
    assert capture.norms(scale=torch.ones(SIZE)) is None
    assert "compiled" in capture.reason


@dataclass
class _Answer:
    logits: Tensor
    extra: str = "none"


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> _Answer:
        return _Answer(self.layer(x))


def test_outputs_in_dataclasses() -> None:
    def loss(output: _Answer, target: Tensor) -> Tensor:
        return cross_entropy(output.logits, target)

    model, x, y = Answers(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    assert wrong_by(gradient_norms(model, loss, x, y), model, x, y, loss) <= 1e-5
    wanted = (model.layer(x).softmax(1) - functional.one_hot(y, 5)).norm(dim=1).detach()
    torch.testing.assert_close(gradient_norms(model, loss, x, y, method="bound"), wanted)
    with capture_norms(model) as capture:
        loss(model(x), y).sum().backward()
    inside = capture.norms(scale=torch.ones(SIZE))
    assert inside is not None
    assert wrong_by(inside, model, x, y, loss) <= 1e-5


class Distances(nn.Module):
    """A subclass of Embedding, looked up without a batch."""

    class Table(nn.Embedding):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.head = nn.Embedding(9, 6), self.Table(4, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens) + self.places(torch.arange(4))).mean(1))


def test_a_graph_that_cannot_be_read_leads_to_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, y = Distances().eval(), torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    for _ in range(2):
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 1e-5
    inside = captured(model, tokens, y)
    assert inside is not None
    assert wrong_by(inside, model, tokens, y) <= 1e-5
    other = Distances().eval()
    monkeypatch.setattr("dask_isgd.norms.shared_terms.feeds_of", lambda *arguments: 1 / 0)
    assert wrong_by(NormEngine(other, cross_entropy)(tokens, y)[0], other, tokens, y) <= 1e-5
    assert captured(other, tokens, y) is None


def test_the_learner_is_fed_back_by_a_transformer_with_dropout() -> None:
    model = PositionsBeforeAttention("plain")
    trainer = Trainer(model, cross_entropy, Learning(steps=9, device="cpu"))
    for step in range(4):
        tokens, y = torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
        result = trainer.step(step, (tokens,), y, np.ones(SIZE), norms=True)
        assert result.norms is not None
        assert (result.norms > 0).all()
