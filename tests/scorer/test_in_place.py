"""Batches share the memory of the cache, and a model that writes to its inputs leaves no changed rows there."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.core import models
from dask_isgd.scorer import task
from dask_isgd.scorer.chunk_reader import shared_reader
from dask_isgd.storage import WeightArray, write_dataset

N = 48
X = np.random.default_rng(0).normal(size=(N, 3)).astype("f4")


class Halving(nn.Module):
    """Halves its inputs where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x.mul_(0.5))


@pytest.fixture
def plan(tmp_path):
    arrays = {"x": X, "y": np.arange(N) % 2}
    for group in ("train", "test"):
        write_dataset(tmp_path / "d", group, arrays, inputs="x", target="y", chunk_size=N)
    made = prepare(
        RunRequest(
            model=Halving,
            data=isgd.Dataset(tmp_path / "d"),
            validation=isgd.Dataset(tmp_path / "d", group="test"),
            run_dir=tmp_path / "run",
            learning=isgd.Learning(steps=1),
            scoring=isgd.Scoring(chunk_size=N, batch_size=16),
        )
    )
    create(made)
    shared_reader(0).clear()
    return made


def test_a_model_that_works_in_place_changes_no_score_and_no_evaluation(plan):
    tensors = dict(models.build(Halving, 0).state_dict())
    weights = WeightArray.open(plan.spec.directory.weights)
    found = []
    for _ in range(3):
        report = task.score(tensors, plan.spec, 0, 1, 0)
        found.append((weights.read(0).tolist(), report.loss, task.evaluate(tensors, plan.spec, 0, N, 1, 0)))
    assert found[1:] == found[:-1]
    assert found[0][2].loss == pytest.approx(found[0][1])
    assert shared_reader(plan.spec.scoring.cache_memory_bytes).nbytes == 2 * N * (3 * 4 + 8), "both were kept"
