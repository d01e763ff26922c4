"""A batch that does not fit into memory is halved, and the size that did is remembered."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.loss import cross_entropy
from dask_isgd.errors import ConfigError
from dask_isgd.norms import NormEngine
from dask_isgd.scorer import task
from dask_isgd.scorer.adaptive_batch import AdaptiveBatch, is_out_of_memory
from dask_isgd.storage import WeightArray


class Device:
    """A function whose memory holds ``room`` examples; keeps the sizes it was asked for."""

    def __init__(self, room: int, error: RuntimeError | None = None) -> None:
        self.room, self.asked = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, inputs, targets):
        self.asked.append(len(targets))
        if len(targets) > self.room:
            raise self.error
        return inputs[0] * 2, targets


@pytest.mark.parametrize(
    ("count", "most", "room", "asked", "kept"),
    [
        (10, 16, 16, [10], 16),
        (10, 4, 16, [4, 4, 2], 4),
        (16, 16, 8, [16, 8, 8], 8),
        (16, 16, 3, [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2], 2),
        (5, 16, 3, [5, 2, 2, 1], 2),
    ],
)
def test_parts(count, most, room, asked, kept):
    device, adaptive_batch = Device(room), AdaptiveBatch(most)
    values, targets = torch.arange(count), torch.arange(count)
    doubled, same = adaptive_batch(device, (values,), targets)
    assert torch.equal(doubled, 2 * values)
    assert torch.equal(same, targets)
    assert (device.asked, adaptive_batch.size) == (asked, kept)
    device.asked.clear()
    adaptive_batch(device, (values,), targets)
    assert max(device.asked) <= room, "what did not fit is not tried again"


@pytest.mark.parametrize(
    ("fixed", "message"), [(True, "a synchronous run cannot use a smaller batch"), (False, "not even one example fits")]
)
def test_what_cannot_fit(fixed, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveBatch(4, fixed=fixed)(Device(0), (torch.zeros(4),), torch.zeros(4))


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 1 bytes"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("x"), False),
    ],
)
def test_which_errors_are_meant(error, memory):
    assert is_out_of_memory(error) is memory
    if isinstance(error, RuntimeError) and not memory:
        with pytest.raises(RuntimeError, match="shapes"):
            AdaptiveBatch(4)(Device(2, error), (torch.zeros(4),), torch.zeros(4))


class Small(torch.nn.Module):
    """The digits' model on a device that holds ``room`` examples."""

    room = 10**9

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.build(MODEL, 0)

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


@pytest.mark.parametrize("exact", [False, True])
def test_a_scoring_task(digits, tmp_path, monkeypatch, exact):
    plan = prepare(
        RunRequest(
            model=Small,
            data=digits,
            run_dir=tmp_path / "run",
            learning=isgd.Learning(steps=1, synchronous=exact),
            scoring=isgd.Scoring(chunk_size=64, ignore=["*.bias"]),
        )
    )
    create(plan)
    model = models.build(Small, 0)
    tensors = dict(model.state_dict())
    rows = digits.read(0, 64)
    inputs, targets = Prepare(digits, torch.device("cpu"))(rows.inputs, rows.target)
    truth, _ = NormEngine(model, cross_entropy, ignore=["*.bias"])(inputs[0], targets)
    monkeypatch.setattr(Small, "room", 20)
    replicas = []
    make = task._Replica
    monkeypatch.setattr(task, "_Replica", lambda spec: replicas.append(make(spec)) or replicas[-1])
    if exact:
        with pytest.raises(ConfigError, match="a synchronous run cannot use a smaller batch"):
            task.score(tensors, plan.spec, 0, 1, 0)
        return
    report = task.score(tensors, plan.spec, 0, 1, 0)
    assert (report.examples, report.bad) == (64, 0)
    (replica,) = replicas
    assert replica.adaptive_batch.size == 16
    written = WeightArray.open(plan.spec.directory.weights).read(0)
    torch.testing.assert_close(torch.from_numpy(written), truth, rtol=1e-5, atol=1e-6)


def test_a_thread_keeps_the_models_of_several_runs(digits, tmp_path):
    specs = []
    for i in range(task._MOST_RUNS + 1):
        plan = prepare(RunRequest(model=MODEL, data=digits, run_dir=tmp_path / str(i), learning=isgd.Learning(steps=1)))
        create(plan)
        specs.append(plan.spec)
    tensors = dict(models.build(MODEL, 0).state_dict())
    made = [task._replica_for(spec, tensors, (1, 0)) for spec in specs]
    assert task._replica_for(specs[-1], tensors, (1, 0)) is made[-1]
    assert task._replica_for(specs[1], tensors, (1, 0)) is made[1]
    assert task._replica_for(specs[0], tensors, (1, 0)) is not made[0], "the one unused for longest went"


def test_a_resumed_run_is_scored_by_its_new_settings(digits, tmp_path):
    settings = {"learning": isgd.Learning(steps=1)}
    first = prepare(RunRequest(model=MODEL, data=digits, run_dir=tmp_path / "run", **settings))
    create(first)
    resumed = prepare(
        RunRequest(
            model=MODEL,
            data=digits,
            run_dir=tmp_path / "run",
            resume=True,
            scoring=isgd.Scoring(method="loss"),
            **settings,
        )
    )
    assert resumed.spec.run == first.spec.run
    tensors = dict(models.build(MODEL, 0).state_dict())
    exact, loss = (task._replica_for(plan.spec, tensors, (1, 0)).engine.method for plan in (first, resumed))
    assert (exact, loss) == ("exact", "loss")
