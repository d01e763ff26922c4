"""Parameters of layers that no rule serves, read off the graph: exact in scoring and inside a training step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from norms_oracle import cross_entropy, oracle
from torch import Tensor, nn
from torch.nn import functional

from dask_isgd.config import Learning
from dask_isgd.errors import ConfigError
from dask_isgd.learner.trainer import Trainer
from dask_isgd.norms import NormEngine, capture_norms, gradient_norms
from dask_isgd.norms.recurrent import composed_recurrence

SIZE = 8
WIDTH = 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


class StandardisedConv(nn.Conv2d):
    """Convolves with weights that are normalised and scaled at each call, as NFNets do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows, gain = self.weight.reshape(1, len(self.weight), -1), (self.gain * 0.7).view(-1)
        weight = functional.batch_norm(rows, None, None, gain, training=True, eps=1e-6).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ActivatedBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps).relu_()


class ActivatedGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).relu_()


class ChannelsLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class OneMoreScale(nn.Module):
    """RMS normalisation by ``1 + weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class ScaledTable(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 2.5


class OffsetPlaces(nn.Embedding):
    """Positions that are looked up by a subclass, from the third row on, without a batch."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.arange(tokens.shape[1]) + 2)


class Windows(nn.Module):
    """Attention in windows that are folded into the batch, with a table of biases by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.biases = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(3, 2))
        self.register_buffer("index", torch.tensor([[1, 2], [0, 1]]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        parts = self.qkv(x.reshape(-1, 2, WIDTH)).reshape(-1, 2, 3, 2, WIDTH // 2)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        bias = self.biases[self.index.view(-1)].view(2, 2, 2).permute(2, 0, 1).unsqueeze(0)
        scores = query @ key.mT + bias
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(size, length, WIDTH)


class RelativeKeys(nn.Module):
    """One projection of the tokens and of a normalised table of distances, repeated for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.table, self.norm = nn.Linear(WIDTH, WIDTH), nn.Embedding(4, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        distances = self.project(self.norm(self.table.weight)).unsqueeze(0).repeat(len(x), 1, 1)
        keys = self.project(x)
        return torch.tanh(keys @ distances.mT) @ distances


class Parts(nn.Module):
    """One matrix that is cut in three: one part is used twice, the others once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.weight.split(WIDTH)
        return functional.linear(torch.tanh(functional.linear(x, a)), a) + functional.linear(x, b) * (x @ c)


class Columns(nn.Module):
    """One matrix of which each column is used once; they are counted from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.columns.select(-1, 0)) + x * self.columns.select(-1, -1)


class CrossAttention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.first = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first), batch_first

    def forward(self, x: Tensor) -> Tensor:
        query, memory = x[:, :2], torch.tanh(x)
        if not self.first:
            query, memory = query.transpose(0, 1), memory.transpose(0, 1)
        y = self.attention(query, memory, memory)[0]
        return y if self.first else y.transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cells = kind(WIDTH, WIDTH // (2 if options.get("bidirectional") else 1), batch_first=True, **options)
        self.out = nn.Linear(options.get("proj_size", WIDTH), WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0])


class Alphas(nn.Module):
    """Sums and differences with factors, divisions, and one parameter at several operations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sub(torch.add(x, self.a, alpha=0.3), self.b, alpha=2.0) / self.b
        return torch.tanh(self.a / (1.5 + y.square())) + torch.exp(-self.a) * y


class Pictures(nn.Module):
    """Puts a layer of images between layers with rules."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(9, 2 * 4), layer, nn.Linear(4, 5)
        self.entry = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.entry(self.table(tokens).unflatten(-1, (2, 4)).transpose(1, 2))
        return self.head(torch.tanh(self.layer(x)).mean((2, 3)))


class Words(nn.Module):
    """Puts a layer of positions between layers with rules."""

    def __init__(self, layer: nn.Module, table: nn.Embedding | None = None, places: nn.Module | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH) if table is None else table
        self.layer, self.places, self.head = layer, places, nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x if self.places is None else x + self.places(tokens)
        return self.head(torch.tanh(self.layer(x)).mean(1))


class Tied(nn.Module):
    """A table that is looked up twice and is the output layer too."""

    def __init__(self, padding: int | None = None, *, cancels: bool = False) -> None:
        super().__init__()
        self.table, self.sign = nn.Embedding(5, WIDTH, padding_idx=padding), -1.0 if cancels else 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens % 5) + torch.tanh(self.table((tokens + 1) % 5))
        return functional.linear(x * self.sign, self.table.weight).mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "standardised convolution": lambda: Pictures(StandardisedConv(4, 4)),
    "batch norm and activation": lambda: Pictures(ActivatedBatchNorm(4)),
    "group norm and activation": lambda: Pictures(ActivatedGroupNorm(2, 4)),
    "layer norm of channels": lambda: Pictures(ChannelsLayerNorm(4)),
    "scale plus one": lambda: Words(OneMoreScale()),
    "scaled table": lambda: Words(nn.Identity(), ScaledTable(9, WIDTH)),
    "places with an offset": lambda: Words(nn.Tanh(), places=OffsetPlaces(9, WIDTH)),
    "windows": lambda: Words(Windows()),
    "relative keys": lambda: Words(RelativeKeys()),
    "parts": lambda: Words(Parts()),
    "columns": lambda: Words(Columns()),
    "cross-attention": lambda: Words(CrossAttention(batch_first=True)),
    "cross-attention, positions first": lambda: Words(CrossAttention(batch_first=False)),
    "RNN": lambda: Words(Recurrent(nn.RNN)),
    "GRU": lambda: Words(Recurrent(nn.GRU, num_layers=2)),
    "LSTM": lambda: Words(Recurrent(nn.LSTM)),
    "LSTM, both directions": lambda: Words(Recurrent(nn.LSTM, bidirectional=True)),
    "LSTM with projections": lambda: Words(Recurrent(nn.LSTM, proj_size=3)),
    "factors": lambda: Words(Alphas()),
    "tied": Tied,
    "tied, with padding": lambda: Tied(2),
    "tied, the terms cancel": lambda: Tied(cancels=True),
    "weight normalisation": lambda: Words(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
}


def wrong_by(norms: Tensor, model: nn.Module, tokens: Tensor, y: Tensor) -> float:
    wanted = oracle(model, cross_entropy, tokens, y)
    return float(((norms.double() - wanted).abs() / wanted).max())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", MODELS)
def test_read_off_the_graph(name: str) -> None:
    model = MODELS[name]().eval()
    engine = NormEngine(model, cross_entropy)
    sizes = (SIZE, 4), (4, 4), (WIDTH, 4), (SIZE, 6), (1, 4)  # as many examples as positions, or features
    for size, length in sizes:
        tokens, y = torch.randint(0, 9, (size, length)), torch.randint(0, 5, (size,))
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 2e-5
        with capture_norms(model) as capture:
            cross_entropy(model(tokens), y).sum().backward()
        inside = capture.norms(scale=torch.ones(size))
        if inside is not None:
            assert wrong_by(inside, model, tokens, y) <= 2e-5
        elif size > 1:
            assert "LSTM" in name, capture.reason
    assert engine.plan is not None
    assert not engine.plan.fallback
    assert not engine.plan.copies


def test_the_training_step_is_the_same_to_the_bit() -> None:
    gradients = []
    for watched in (False, True):
        torch.manual_seed(5)
        model, tokens, y = Words(RelativeKeys()), torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
        with capture_norms(model if watched else nn.Linear(1, 1)):
            cross_entropy(model(tokens), y).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["standardised convolution", "relative keys", "windows", "tied", "GRU"])
def test_the_learner_feeds_back(name: str) -> None:
    model = MODELS[name]().eval()
    trainer = Trainer(model, cross_entropy, Learning(steps=9, device="cpu"))
    for step in range(3):
        tokens, y = torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
        wanted = oracle(model, cross_entropy, tokens, y, train_mode=True)
        result = trainer.step(step, (tokens,), y, np.ones(SIZE), norms=True)
        assert result.norms is not None
        torch.testing.assert_close(torch.as_tensor(result.norms).double(), wanted, rtol=1e-4, atol=0)


def test_a_reader_that_fails_leaves_the_training_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, y = Words(Columns()), torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))

    def fails(*_: Any) -> bool:
        raise RuntimeError("a node of another kind")

    for broken in (False, True):
        if broken:
            monkeypatch.setattr("dask_isgd.norms.graph_reader._parts_apart", fails)
        with capture_norms(model) as capture:
            cross_entropy(model(tokens), y).sum().backward()
        assert (capture.norms(scale=torch.ones(SIZE)) is None) == broken
    assert "a node of another kind" in capture.reason


class SwitchedTable(nn.Module):
    """Shares its table with another operation in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head, self.again = nn.Parameter(torch.randn(4, WIDTH)), nn.Linear(WIDTH, 5), False
        self.table = nn.Embedding(9, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.places
        x = x * torch.sigmoid(self.places) if self.again else x
        return self.head(torch.tanh(x).mean(1))


def test_other_uses_in_later_batches_are_found_out() -> None:
    model = SwitchedTable().eval()
    engine = NormEngine(model, cross_entropy)
    for number in range(9):
        model.again = number % 3 == 2
        tokens, y = torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 1e-5
        with capture_norms(model) as capture:
            cross_entropy(model(tokens), y).sum().backward()
        inside = capture.norms(scale=torch.ones(SIZE))
        if inside is not None:
            assert wrong_by(inside, model, tokens, y) <= 1e-5


class ReversedPlaces(nn.Module):
    """Adds positions to the examples in reverse: the rows that arrive are not whose they seem."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.head = (
            nn.Embedding(9, WIDTH),
            nn.Parameter(torch.randn(4, WIDTH)),
            nn.Linear(6, 5),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.table(tokens).flip(0) + self.places).flip(0)
        return self.head(torch.tanh(x).mean(1))


def test_rows_in_reverse_are_never_read() -> None:
    model = ReversedPlaces().eval()
    engine = NormEngine(model, cross_entropy)
    for _ in range(2):
        tokens, y = torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
        assert wrong_by(engine(tokens, y)[0], model, tokens, y) <= 1e-5


class LayoutMatters(nn.Module):
    """Adds its table in another way if the input is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Parameter(torch.randn(4, WIDTH)), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places if x.is_contiguous() else x - torch.stack(list(-self.places))
        return self.head(torch.tanh(x).mean(1))


def test_an_odd_batch_does_not_end_the_readings_of_the_others() -> None:
    model = LayoutMatters().eval()
    engine = NormEngine(model, cross_entropy)
    for number in range(4):
        x, y = torch.randn(SIZE, 4, WIDTH), torch.randint(0, 5, (SIZE,))
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if number == 1 else x  # an audit's rows are contiguous
        assert wrong_by(engine(x, y)[0], model, x, y) <= 1e-5
    assert engine.plan is not None
    assert [term.name for term in engine.plan.shared] == ["places"]


def test_a_recurrent_layer_where_the_flags_of_backends_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.__allow_nonbracketed_mutation_flag", False)  # what disable_global_flags() does
    model, tokens, y = Words(Recurrent(nn.LSTM)).eval(), torch.randint(0, 9, (SIZE, 4)), torch.randint(0, 5, (SIZE,))
    assert wrong_by(NormEngine(model, cross_entropy)(tokens, y)[0], model, tokens, y) <= 2e-5
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled


def test_the_flags_of_backends_are_restored_by_the_last_thread_that_runs_a_recurrent_layer() -> None:
    """They belong to the process: the second thread finds them off, and must not leave them so."""
    inside, leave = threading.Barrier(3, timeout=60), [threading.Event(), threading.Event()]

    class Waits(nn.RNN):
        number = 0

        def forward(self, x: Tensor) -> Any:
            found.append(torch.backends.mkldnn.enabled)
            inside.wait()
            assert leave[self.number].wait(60)
            return super().forward(x)

    def run(number: int) -> None:
        layer = Waits(WIDTH, WIDTH)
        layer.number = number
        with composed_recurrence(layer), composed_recurrence(layer):
            layer(torch.zeros(1, 1, WIDTH))

    found: list[bool] = []
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    leave[0].set()
    threads[0].join(60)
    assert not torch.backends.mkldnn.enabled, "the other thread is inside"
    leave[1].set()
    threads[1].join(60)
    assert found == [False, False]
    assert torch.backends.mkldnn.enabled


def test_ignored_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.PReLU(), nn.Linear(WIDTH, 5))
    x, y = torch.randn(SIZE, WIDTH), torch.randint(0, 5, (SIZE,))
    norms = gradient_norms(model, cross_entropy, x, y, ignore=("1.*", "*.bias"))
    for name in ("1.weight", "0.bias", "2.bias"):
        assert model.get_parameter(name).requires_grad
        model.get_parameter(name).requires_grad_(False)
    torch.testing.assert_close(norms.double(), oracle(model, cross_entropy, x, y), rtol=1e-5, atol=0)
    with pytest.raises(ConfigError, match=r"ignore: got '9\.\*'"):
        gradient_norms(model, cross_entropy, x, y, ignore=["9.*"])
    with pytest.raises(ConfigError, match="method='exact'"):
        NormEngine(model, cross_entropy, method="loss", ignore=["0.bias"])
