"""No model ever gets a wrong number: fast if proved, exact one by one if not, refused if undefined."""

from __future__ import annotations

import logging

import pytest
import torch
from norms_oracle import CASES, Attention, TwoInputs, cross_entropy, mlp, oracle
from torch import Tensor, nn

from dask_isgd.errors import ConfigError, ModelError
from dask_isgd.norms import NormEngine, gradient_norms

SIZE = 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float(((got.double() - wanted).abs() / wanted).max())


@pytest.mark.parametrize("name", CASES)
def test_norms_are_autograds(name: str) -> None:
    case = CASES[name]
    model, inputs, targets = case.model(), case.inputs(SIZE), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    norms, losses = engine(inputs, targets)
    wanted = oracle(model, cross_entropy, inputs, targets)
    assert norms.shape == losses.shape == (SIZE,)
    assert norms.dtype == losses.dtype == torch.float32
    assert relative_error(norms, wanted) <= 1e-5
    torch.testing.assert_close(losses, cross_entropy(model.eval()(inputs.clone()), targets).detach())
    assert engine.plan is not None
    assert (not engine.plan.fallback) == case.fast, engine.plan.reasons
    again, _ = engine(inputs[:3], targets[:3])
    assert relative_error(again, wanted[:3]) <= 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_none_and_one(name: str, size: int) -> None:
    case = CASES[name]
    model, inputs, targets = case.model(), case.inputs(size), torch.randint(0, 5, (size,))
    norms = gradient_norms(model, cross_entropy, inputs, targets)
    assert norms.shape == (size,)
    if size:
        assert relative_error(norms, oracle(model, cross_entropy, inputs, targets)) <= 1e-5


@pytest.mark.parametrize("method", ["exact", "bound", "loss"])
@pytest.mark.parametrize("micro_batch", [1, 3, 10, 99])
def test_micro_batches_change_nothing(method: str, micro_batch: int) -> None:
    model, x, y = mlp(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    whole = gradient_norms(model, cross_entropy, x, y, method=method)
    sliced = gradient_norms(model, cross_entropy, x, y, method=method, micro_batch=micro_batch)
    torch.testing.assert_close(sliced, whole)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs(kind: str) -> None:
    model, y = TwoInputs(), torch.randint(0, 5, (SIZE,))
    named = {"left": torch.randn(SIZE, 6), "right": torch.randn(SIZE, 4)}
    inputs = named if kind == "dict" else tuple(named.values())
    wanted = oracle(model, cross_entropy, inputs, y)
    assert relative_error(gradient_norms(model, cross_entropy, inputs, y), wanted) <= 1e-5


def test_the_bound_is_the_gradient_at_the_output() -> None:
    model, x, y = mlp(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    output = model(x)
    wanted = (output.softmax(1) - nn.functional.one_hot(y, 5)).norm(dim=1).detach()
    torch.testing.assert_close(gradient_norms(model, cross_entropy, x, y, method="bound"), wanted)


def test_the_loss_is_at_least_zero() -> None:
    model, x, y = nn.Linear(6, 1), torch.randn(SIZE, 6), torch.zeros(SIZE)
    wanted = model(x)[:, 0].clamp_min(0).detach()
    got = gradient_norms(model, lambda output, target: output[:, 0] - target, x, y, method="loss")
    torch.testing.assert_close(got, wanted)
    assert (wanted == 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x, y = mlp().to(dtype), torch.randn(SIZE, 6).to(dtype), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    norms, _ = engine(x, y)
    assert engine.plan is not None
    assert not engine.plan.fallback
    bound = 0.05 if dtype == torch.bfloat16 else 1e-6
    assert relative_error(norms, oracle(model, cross_entropy, x, y)) <= bound


def test_dropout_in_train_mode_follows_the_mask_that_was_drawn() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 5))
    x, y = torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    torch.manual_seed(7)
    norms = gradient_norms(model, cross_entropy, x, y, train_mode=True)
    torch.manual_seed(7)
    losses = cross_entropy(model.train()(x), y)
    gradients = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in losses]
    wanted = torch.stack([torch.cat([part.flatten() for part in row]).norm() for row in gradients])
    torch.testing.assert_close(norms, wanted)


def test_dropout_in_attention_in_train_mode_follows_the_mask_that_was_drawn() -> None:
    model, x, y = Attention(), torch.randn(SIZE, 4, 8), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy, train_mode=True)
    for seed in range(3):
        torch.manual_seed(seed)
        norms, _ = engine(x, y)
        torch.manual_seed(seed)
        losses = cross_entropy(model.train()(x), y)
        gradients = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in losses]
        wanted = torch.stack([torch.cat([part.flatten() for part in row]).norm() for row in gradients])
        torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=0)
    assert engine.plan is not None
    assert not engine.plan.fallback


def test_dropout_in_train_mode_through_the_fallback() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1), nn.PReLU(), nn.Linear(6, 5))
    x, y = torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    norms = gradient_norms(model, cross_entropy, x, y, train_mode=True)
    assert torch.isfinite(norms).all()
    assert (norms > 0).all()


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False), nn.SyncBatchNorm(6)],
    ids=["BatchNorm1d", "without running statistics", "SyncBatchNorm"],
)
def test_batch_normalisation_in_train_mode_is_refused(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 5))
    with pytest.raises(ModelError, match=r"normalising by the batch's own statistics[\s\S]*eval mode"):
        gradient_norms(model, cross_entropy, torch.randn(4, 6), torch.zeros(4, dtype=torch.long), train_mode=True)


class _Coupled(nn.Module):
    def __init__(self, *, through_values: bool) -> None:
        super().__init__()
        self.layer, self.through_values = nn.Linear(6, 5), through_values

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        mean = y.mean(0)
        return y - (mean.detach() if self.through_values else mean)


@pytest.mark.parametrize("through_values", [False, True])
def test_models_that_couple_examples_are_refused(through_values: bool) -> None:
    with pytest.raises(ModelError, match="couples the examples"):
        gradient_norms(
            _Coupled(through_values=through_values), cross_entropy, torch.randn(8, 6), torch.randint(0, 5, (8,))
        )


def test_a_loss_that_couples_examples_is_refused() -> None:
    def mixed(output: Tensor, target: Tensor) -> Tensor:
        losses = cross_entropy(output, target)
        return losses / losses.sum()

    with pytest.raises(ModelError, match="couples the examples"):
        gradient_norms(mlp(), mixed, torch.randn(8, 6), torch.randint(0, 5, (8,)))


@pytest.mark.parametrize("method", ["exact", "bound", "loss"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(), r"shape \(\) .*shape \(8,\).*reduction='none'"),
        (lambda o, t: cross_entropy(o, t)[:, None], r"shape \(8, 1\).*shape \(8,\)"),
        (lambda o, t: cross_entropy(o, t)[1:], r"shape \(7,\).*shape \(8,\)"),
        (lambda o, t: o.argmax(1), r"torch.int64"),
        (lambda o, t: 1.0, "returned float"),
    ],
    ids=["mean", "column", "too short", "integers", "a number"],
)
def test_losses_of_the_wrong_shape(method: str, loss: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        gradient_norms(mlp(), loss, torch.randn(8, 6), torch.randint(0, 5, (8,)), method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(8, 6), torch.zeros(7, dtype=torch.long), r"targets of shape \(7,\), wanted the batch of 8"),
        (torch.tensor(1.0), torch.zeros(1), "inputs of shape"),
        ((), torch.zeros(1), "without a tensor"),
    ],
)
def test_batches_of_the_wrong_shape(inputs: object, targets: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        gradient_norms(mlp(), cross_entropy, inputs, targets)


def test_a_cut_graph_and_a_frozen_model_are_refused() -> None:
    x, y = torch.randn(8, 6), torch.randint(0, 5, (8,))
    with pytest.raises(ModelError, match="depends on no trainable parameter"):
        gradient_norms(mlp(), lambda o, t: cross_entropy(o.detach(), t), x, y)
    with pytest.raises(ModelError, match="without a trainable parameter"):
        gradient_norms(mlp().requires_grad_(False), cross_entropy, x, y)
    with pytest.raises(ModelError, match="run one batch"):
        gradient_norms(nn.LazyLinear(5), cross_entropy, x, y)
    with pytest.raises(ConfigError, match="method"):
        gradient_norms(mlp(), cross_entropy, x, y, method="exakt")


def test_the_fallback_is_logged_once_with_the_reasons(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["control flow on values"]
    engine = NormEngine(case.model(), cross_entropy)
    with caplog.at_level(logging.WARNING, "dask_isgd.norms"):
        for _ in range(2):
            engine(case.inputs(4), torch.zeros(4, dtype=torch.long))
    (record,) = caplog.records
    assert "matrix: no rule for Stubborn" in record.message
    assert "by a loop, because vmap fails" in record.message


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from dask_isgd.norms.rules.linear import LinearRule

    right = LinearRule.norms
    monkeypatch.setattr(LinearRule, "norms", lambda *arguments: 1.1 * right(*arguments))
    model, x, y = mlp(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    assert relative_error(gradient_norms(model, cross_entropy, x, y), oracle(model, cross_entropy, x, y)) <= 1e-5
    assert "its rule gives" in caplog.text


def test_the_plan_follows_the_model() -> None:
    model, x, y = mlp(), torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    for change in (
        lambda: None,
        lambda: model[0].requires_grad_(False),
        lambda: model[0].requires_grad_(True),
        lambda: setattr(model, "2", nn.Linear(9, 8)),
        lambda: setattr(model[4], "weight", nn.Parameter(torch.randn(5, 8))),
    ):
        change()
        norms, _ = engine(x, y)
        assert relative_error(norms, oracle(model, cross_entropy, x, y)) <= 1e-5


class _Recycling(nn.Module):
    """Changes a layer's input in place after the layer has used it; only if requested."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.recycles = nn.Linear(6, 6), nn.Linear(6, 5), False

    def forward(self, x: Tensor) -> Tensor:
        h = 2 * x
        y = self.layer(h)
        if self.recycles:
            h += 1
        return self.head(torch.tanh(y + h).mean(1))


def test_an_input_overwritten_behind_the_capture_is_autograds_own_error() -> None:
    model, x, y = _Recycling(), torch.randn(SIZE, 3, 6), torch.randint(0, 5, (SIZE,))
    engine = NormEngine(model, cross_entropy)
    engine(x, y)
    model.recycles = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine(x, y)


class _Branching(nn.Module):
    """Goes another way for other batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) > 0:
            return self.head(torch.tanh(self.a(x)))
        return self.head(torch.tanh(self.a(self.a(self.b(x)))))


def test_control_flow_that_the_audit_did_not_see() -> None:
    model, y = _Branching(), torch.randint(0, 5, (SIZE,))
    x = torch.randn(SIZE, 6)
    engine = NormEngine(model, cross_entropy)
    for sign in (1, -1, 1, -1):
        x[:, 0] = sign * x[:, 0].abs()
        norms, _ = engine(x, y)
        assert relative_error(norms, oracle(model, cross_entropy, x, y)) <= 1e-5


def test_tiny_and_exploded_gradients() -> None:
    model, y = nn.Linear(6, 1, bias=False), torch.zeros(2)
    x = torch.tensor([[3.0], [4.0]]) @ torch.eye(1, 6)
    tiny = gradient_norms(model, lambda o, t: 1e-15 * o[:, 0] - t, x, y)
    torch.testing.assert_close(tiny, 1e-15 * x[:, 0], rtol=1e-5, atol=0)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    engine = NormEngine(model, lambda o, t: (o[:, 0] - t).square())
    assert engine(x, y)[0].isnan().all()
    with torch.no_grad():
        model.weight.fill_(1.0)
    torch.testing.assert_close(engine(x, y)[0], 2 * x[:, 0].square())
