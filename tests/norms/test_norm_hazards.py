"""Models that other tools get silently wrong: exact here, fast if the case is marked so, or refused; never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from norms_oracle import cross_entropy, oracle
from torch import Tensor, nn
from torch.nn import functional

from dask_isgd.errors import ModelError
from dask_isgd.norms import NormEngine, capture_norms, gradient_norms

SIZE = 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(4)


def wrong_by(norms: Tensor, model: nn.Module, loss: Any, inputs: Any, targets: Any) -> float:
    wanted = oracle(model, loss, inputs, targets)
    return float(((norms.double() - wanted).abs() / wanted).max())


class Reads(nn.Module):
    """Tokens, something in the middle, the mean over positions, a head."""

    def __init__(self, middle: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(9, 6), middle, nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.table(tokens))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: Any, *, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.cells, self.batch_first = kind(6, 7, batch_first=batch_first, **options), batch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0] if self.batch_first else self.cells(x.transpose(0, 1))[0].transpose(0, 1)


class Positions(nn.Module):
    """Learned positions, of every make."""

    def __init__(self, make: str) -> None:
        super().__init__()
        self.make = make
        if make == "parameter":
            self.places = nn.Parameter(torch.randn(4, 6))
        elif make == "parameter with a leading one":
            self.places = nn.Parameter(torch.randn(1, 4, 6))
        else:
            self.places = nn.Embedding(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.make == "embedding with a leading one":
            return x + self.places(torch.arange(length)[None])
        if self.make == "embedding":
            return x + self.places(torch.arange(length))
        # A slice of the first dimension does not apply to the copies of an example: read off the graph.
        return x + (self.places[:length] if self.make == "parameter" else self.places[:, :length])


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


class OwnNorm(nn.Module):
    """A root mean square norm as many libraries define it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)) + self.bias


class Product(nn.Module):
    """A raw matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Attends(nn.Module):
    """The batch second, and another tensor's keys."""

    def __init__(self, *, crossed: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention, self.crossed = nn.MultiheadAttention(6, 2, **options), crossed

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        other = torch.tanh(x) if self.crossed else x
        return self.attention(x, other, other)[0].transpose(0, 1)


class Masked(nn.Module):
    """Attention under every kind of mask."""

    def __init__(self, *, causal: bool, need_weights: bool, boolean: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.causal, self.need_weights, self.boolean = causal, need_weights, boolean

    def forward(self, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        square = torch.ones(length, length, dtype=torch.bool).triu(1)
        padding = torch.arange(length) >= 1 + x.detach()[:, :1, 0].gt(0) + length // 2
        if not self.boolean:
            square = torch.zeros(2 * size, length, length, dtype=x.dtype).masked_fill(square, float("-inf"))
            padding = torch.zeros(padding.shape, dtype=x.dtype).masked_fill(padding, float("-inf"))
        options: dict[str, Any] = {"attn_mask": square, "is_causal": True} if self.causal else {}
        if not self.causal:
            options = {"key_padding_mask": padding, "attn_mask": square}
        output, weights = self.attention(x, x, x, need_weights=self.need_weights, **options)
        return output if weights is None else output + weights.sum(2, keepdim=True).square()


class Folded(nn.Module):
    """A layer whose input has positions folded into the batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class TiedHead(nn.Module):
    """The table of tokens is the output layer's weight."""

    def __init__(self, *, layer: bool) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False) if layer else None
        if self.head is not None:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.body(self.table(tokens))).mean(1)
        return functional.linear(x, self.table.weight) if self.head is None else self.head(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "RNN": (lambda: Reads(Recurrent(nn.RNN, batch_first=True), 7), True),
    "LSTM": (lambda: Reads(Recurrent(nn.LSTM, batch_first=True), 7), True),
    "GRU, two layers, both ways, batch second": (
        lambda: Reads(Recurrent(nn.GRU, batch_first=False, num_layers=2, bidirectional=True), 14),
        True,
    ),
    "positions, a parameter": (lambda: Reads(Positions("parameter")), True),
    "positions, (1, T, d)": (lambda: Reads(Positions("parameter with a leading one")), True),
    "positions, an embedding": (lambda: Reads(Positions("embedding")), True),
    "positions, an embedding of (1, T)": (lambda: Reads(Positions("embedding with a leading one")), True),
    "a class token": (lambda: Reads(ClassToken()), True),
    "an own norm": (lambda: Reads(OwnNorm()), True),
    "a raw matrix": (lambda: Reads(Product()), True),
    "one slope for all": (lambda: Reads(nn.PReLU()), False),
    "attention": (lambda: Reads(Attends()), True),
    "attention without biases": (lambda: Reads(Attends(bias=False)), True),
    "attention with a bias of its own": (lambda: Reads(Attends(add_bias_kv=True)), False),
    "attention to another tensor": (lambda: Reads(Attends(crossed=True)), True),
    "attention, causal": (lambda: Reads(Masked(causal=True, need_weights=False, boolean=True)), True),
    "attention, masked": (lambda: Reads(Masked(causal=False, need_weights=True, boolean=True)), True),
    "attention, masks of numbers": (lambda: Reads(Masked(causal=False, need_weights=False, boolean=False)), True),
    "an encoder layer": (lambda: Reads(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), True),
    "an encoder layer, norm first": (
        lambda: Reads(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True)),
        True,
    ),
    "folded positions": (lambda: Reads(Folded(nn.Linear(6, 6))), True),
    "folded positions, a norm": (lambda: Reads(Folded(nn.LayerNorm(6))), True),
    "folded positions, a convolution": (
        lambda: Reads(Folded(nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten()))),
        False,
    ),
    "a table tied to the output layer": (lambda: TiedHead(layer=True), True),
    "a table tied by F.linear": (lambda: TiedHead(layer=False), True),
    "a bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 6, mode="mean"), nn.Linear(6, 5)), False),
    "a sparse table": (
        lambda: nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(24, 5)),
        True,
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", MODELS)
def test_exact(name: str) -> None:
    build, fast = MODELS[name]
    model, tokens, y = build(), torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    for rows in (SIZE, 4, 1):  # as many examples as positions, too
        norms, _ = engine(tokens[:rows], y[:rows])
        assert wrong_by(norms, model, cross_entropy, tokens[:rows], y[:rows]) <= 1e-5
    assert engine.plan is not None
    assert (not engine.plan.fallback) == fast, engine.plan.reasons


class _Wrapped(NamedTuple):
    logits: Tensor
    extra: dict[str, Any]


class _SeveralOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, left: Tensor, right: Tensor) -> _Wrapped:
        return _Wrapped(self.layer(left), {"other": self.layer(right), "name": "right"})


@pytest.mark.parametrize("method", ["exact", "bound"])
def test_outputs_in_tuples_and_dicts(method: str) -> None:
    def loss(output: _Wrapped, target: Tensor) -> Tensor:
        return cross_entropy(output.logits, target) + output.extra["other"].square().sum(1)

    model, y = _SeveralOutputs(), torch.randint(0, 5, (SIZE,))
    inputs = {"left": torch.randn(SIZE, 6), "right": torch.randn(SIZE, 6)}
    norms = gradient_norms(model, loss, inputs, y, method=method)
    if method == "exact":
        assert wrong_by(norms, model, loss, inputs, y) <= 1e-5
    else:
        output = model(**inputs)
        at_logits = output.logits.softmax(1) - functional.one_hot(y, 5)
        wanted = torch.cat([at_logits, 2 * output.extra["other"]], 1).norm(dim=1).detach()
        torch.testing.assert_close(norms, wanted)


class _Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(tokens)))) * mask[:, :, None]


def test_sequence_losses_with_masks() -> None:
    def loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        losses = cross_entropy(output.transpose(1, 2), target["next"]) * target["mask"]
        return losses.sum(1) / target["mask"].sum(1)

    lengths = torch.randint(1, 6, (SIZE, 1))
    mask = (torch.arange(5) < lengths).float()
    inputs = (torch.randint(0, 9, (SIZE, 5)), mask)
    targets = {"next": torch.randint(0, 9, (SIZE, 5)), "mask": mask}
    model = _Language()
    assert wrong_by(gradient_norms(model, loss, inputs, targets), model, loss, inputs, targets) <= 1e-5


@pytest.mark.parametrize("captured", [False, True])
def test_autocast_as_the_user_configures_it(captured: bool) -> None:
    body = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5)
    model, x, y = nn.Sequential(*body), torch.randn(SIZE, 2, 5, 5), torch.randint(0, 5, (SIZE,))
    wanted = oracle(model, cross_entropy, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if captured:
            with capture_norms(model) as capture:
                cross_entropy(model(x), y).sum().backward()
            norms = capture.norms(scale=torch.ones(SIZE))
            assert norms is not None
        else:
            engine = NormEngine(model, cross_entropy)
            norms, _ = engine(x, y)
            assert engine.plan is not None
            assert not engine.plan.fallback
    assert norms.dtype == torch.float32
    assert float(((norms - wanted).abs() / wanted).max()) <= 0.02


@pytest.mark.parametrize(
    ("options", "message"), [({"max_norm": 1.0}, "max_norm=1.0"), ({"scale_grad_by_freq": True}, "counts over the")]
)
def test_embeddings_that_change_or_couple_are_refused(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 6, **options), nn.Flatten(), nn.Linear(24, 5))
    before = model[0].weight.clone()
    with pytest.raises(ModelError, match=message):
        gradient_norms(model, cross_entropy, torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,)))
    assert torch.equal(model[0].weight, before)


def test_inputs_of_another_number_of_dimensions_are_audited_again() -> None:
    model = nn.Sequential(OwnNorm(), nn.Linear(6, 5))
    engine = NormEngine(model, lambda o, t: cross_entropy(o if o.ndim == 2 else o.mean(1), t))
    y = torch.randint(0, 5, (SIZE,))
    for shape in ((SIZE, 6), (SIZE, SIZE, 6), (SIZE, 6)):
        x = torch.randn(shape)
        assert wrong_by(engine(x, y)[0], model, engine.loss, x, y) <= 1e-5


class _Switching(nn.Module):
    """Another product for long inputs, for which the audit's copies no longer fit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 4:
            x = x.transpose(0, 1)
            return self.head(torch.tanh((x * self.scale).transpose(0, 1)).mean(1))
        return self.head(torch.tanh(x * self.scale).mean(1))


@pytest.mark.parametrize("length", [7, SIZE])
def test_copies_that_no_longer_fit_are_noticed(length: int) -> None:
    model, y = _Switching(), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    for size in (3, length, 3):
        x = torch.randn(SIZE, size, 6)
        assert wrong_by(engine(x, y)[0], model, cross_entropy, x, y) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT-2", "BERT"])
def test_hugging_face(kind: str) -> None:
    library = pytest.importorskip("transformers")
    tokens = torch.randint(0, 50, (SIZE, 8))
    common = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "GPT-2":
        config = library.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, **common)
        model: nn.Module = library.GPT2LMHeadModel(config)
        targets = tokens

        def loss(output: Any, target: Tensor) -> Tensor:
            return cross_entropy(output.logits[:, :-1].transpose(1, 2), target[:, 1:]).mean(1)
    else:
        config = library.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5, **common
        )
        model = library.BertForSequenceClassification(config)
        targets = torch.randint(0, 5, (SIZE,))

        def loss(output: Any, target: Tensor) -> Tensor:
            return cross_entropy(output.logits, target)

    mask = torch.ones_like(tokens)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    engine = NormEngine(model, loss)
    norms, _ = engine(inputs, targets)
    assert wrong_by(norms, model, loss, inputs, targets) <= 1e-5
    assert engine.plan is not None
    assert not engine.plan.fallback, engine.plan.reasons
    bound = gradient_norms(model, loss, inputs, targets, method="bound")
    assert torch.isfinite(bound).all()
