"""A launched step waits for no device: nothing on its way asks a tensor for its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dask_isgd as isgd
from dask_isgd.core import models
from dask_isgd.core.loss import cross_entropy
from dask_isgd.errors import NonFiniteLossError
from dask_isgd.learner.trainer import Trainer

B = 16
HOST_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.1), nn.Linear(7, 3))


def fused_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def trainer(device: str = "cpu", **changes: Any) -> Trainer:
    rate = {} if changes.get("optimizer") else {"learning_rate": 0.1}
    settings = {"steps": 100, **rate, "device": device, "scheduler": halving, **changes}
    return Trainer(models.build(mlp, 1), cross_entropy, isgd.Learning(**settings))


def minibatch(device: str = "cpu") -> tuple[tuple[Tensor], Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(B, 5, generator=generator), torch.randint(0, 3, (B,), generator=generator)
    return (x.to(device),), y.to(device), np.linspace(0.2, 3.0, B)


class NoHostReads(TorchDispatchMode):
    """Refuses what makes torch wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(function) for name in ("_local_scalar_dense", "nonzero")), str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], TorchDispatchMode]:
    def start() -> TorchDispatchMode:
        for name in HOST_READS:

            def refuse(self: Tensor, *args: Any, name: str = name, **kwargs: Any) -> Any:
                raise AssertionError(f"Tensor.{name} waits for the device")

            monkeypatch.setattr(Tensor, name, refuse)
        return NoHostReads()

    return start


SETTINGS = [
    {},
    {"clip_norm": 0.5},
    {"optimizer": fused_adam},
    {"optimizer": fused_adam, "clip_norm": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" and ".join)
@pytest.mark.parametrize("options", [{}, {"norms": True}, {"norms": True, "measure": True}], ids=str)
def test_a_step_waits_for_nothing(settings, options, no_host_reads, monkeypatch):
    each = trainer(**settings)
    batch = minibatch()
    for step in (0, 1):  # they make the optimizer's state, audit the model and check its second minibatch
        each.step(step, *batch, **options)
    with no_host_reads():
        launched = [each.launch(step, *batch, **options) for step in (2, 3, 4)]
    monkeypatch.undo()
    assert all(np.isfinite(each.result().loss) for each in launched)


def test_the_watch_sees_an_optimizer_that_takes_no_predicate(no_host_reads):
    each = trainer(optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    batch = minibatch()
    each.step(0, *batch)
    assert each.update.waits
    with no_host_reads(), pytest.raises(AssertionError, match="__bool__ waits"):
        each.launch(1, *batch)


@pytest.mark.parametrize(
    "optimizer", [None, fused_adam, lambda p: torch.optim.Adam(p, lr=0.01)], ids=["sgd", "fused", "waits"]
)
@pytest.mark.parametrize("bad_step", [0, 1, 3])
def test_nothing_moves_after_a_step_that_was_not_finite_even_if_more_were_launched(optimizer, bad_step):
    each = trainer(optimizer=optimizer)
    inputs, targets, coefficients = minibatch()
    for step in range(bad_step):
        each.step(step, inputs, targets, coefficients)
    before = {name: tensor.clone() for name, tensor in each.tensors().items()}
    bad = inputs[0].clone()
    bad[5] = torch.nan
    launched = [each.launch(bad_step, (bad,), targets, coefficients, indices=np.arange(100, 100 + B))]
    assert all(torch.equal(tensor, before[name]) for name, tensor in each.tensors().items())
    launched.append(each.launch(bad_step + 1, inputs, targets, coefficients))
    for name, tensor in each.tensors().items():
        if not name.startswith("clipping"):  # a later finite norm counts
            assert torch.equal(tensor, before[name]), name
    assert each.tensors().keys() == before.keys()
    with pytest.raises(NonFiniteLossError, match=rf"step {bad_step}: the loss of 1 of 16 examples.*\[105\]"):
        launched[0].result()
    with pytest.raises(NonFiniteLossError):
        launched[1].result()


@pytest.mark.cuda
@pytest.mark.parametrize("settings", SETTINGS, ids=" and ".join)
@pytest.mark.parametrize("options", [{}, {"norms": True}, {"norms": True, "measure": True}], ids=str)
def test_a_step_on_a_gpu_waits_for_nothing(settings, options):
    each = trainer("cuda", **settings)
    batch = minibatch("cuda")
    for step in (0, 1):
        each.step(step, *batch, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [each.launch(step, *batch, **options) for step in (2, 3, 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(each.result().loss) for each in launched)
