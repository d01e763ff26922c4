"""Which versions are evaluated, and what is made of parts that come back, are lost or fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import KilledWorker
from distributed.client import FutureCancelledError

import dask_isgd as isgd
from dask_isgd.coordinator.evaluation import EvaluatedVersion, Evaluator
from dask_isgd.coordinator.in_flight import CompletedTask
from dask_isgd.runtime.parameters import Parameters
from dask_isgd.scorer.task import Evaluation
from dask_isgd.storage import RunDirectory

STEPS, EVERY, ROWS, BATCH = 100, 20, 10, 4
PARTS = [(0, 4), (4, 8), (8, 10)]
LOST = FutureCancelledError("key", "its worker died")


class FakeTasks:
    """Stands in for ``InFlightTasks``: a test decides how each part ends."""

    def __init__(self) -> None:
        self.flying: dict[int, tuple[int, int]] = {}
        self.over: list[CompletedTask] = []

    def __len__(self) -> int:
        return len(self.flying)

    def keep_group(self, name: str, placement: object) -> None:
        assert name.startswith("evaluate-")

    def launch(self, chunk: int, future: object, order: tuple[int, int]) -> None:
        self.flying[chunk] = order

    def end(self, chunk: int, result: object) -> None:
        self.over.append(CompletedTask(chunk, self.flying[chunk], result))

    def completed(self) -> Iterator[CompletedTask]:
        while self.over:
            task = self.over.pop(0)
            self.flying.pop(task.chunk, None)
            yield task

    def cancel(self) -> None:
        self.flying.clear()
        self.over.clear()


class Evaluating:
    """An evaluator whose cluster is the test."""

    def __init__(self, folder: Path, validation: range | None = range(ROWS)) -> None:
        self.directory, self.tasks = RunDirectory(folder / "run"), FakeTasks()
        self.submitted: list[tuple[int, int, int]] = []
        settings = isgd.Learning(steps=STEPS, evaluate_every=EVERY), isgd.Scoring(batch_size=BATCH)
        spec = SimpleNamespace(
            run="r", learning=settings[0], scoring=settings[1], validation=validation, directory=self.directory
        )
        self.evaluator = Evaluator(spec, self, 1, self.tasks)

    def submit(self, function: object, future: object, spec: object, *rows_and_order: int, **options: Any) -> object:
        start, stop, _, version = rows_and_order
        self.submitted.append((version, start, stop))
        return object()

    def offer(self, version: int, incarnation: int = 1) -> None:
        self.evaluator.offer(Parameters(None, incarnation, version), {"resources": {"scorer": 1}})

    def finish(self, wrong: float = 1.0) -> list[EvaluatedVersion]:
        for part in list(self.tasks.flying):
            start, stop = PARTS[part]
            self.tasks.end(part, Evaluation(stop - start, 2.0 * (stop - start), wrong))
        return list(self.evaluator.completed())

    @property
    def versions(self) -> list[int]:
        return [version for version, start, _ in self.submitted if start == 0]


@pytest.fixture
def evaluating(tmp_path) -> Evaluating:
    return Evaluating(tmp_path)


@pytest.mark.parametrize(
    ("offers", "versions"),
    [
        ([(0, 1), (10, 1), (20, 1), (30, 1), (50, 1)], [0, 20, 50]),
        ([(0, 1), (10, 1), (100, 1)], [0, 100]),  # the last one always
        ([(20, 1), (30, 2), (40, 2)], [20, 30]),  # the first one of a new incarnation
    ],
)
def test_which_versions_are_due(evaluating, offers, versions):
    for version, incarnation in offers:
        evaluating.offer(version, incarnation)
        evaluating.finish()
    assert evaluating.versions == versions


def test_the_parts_add_up_to_a_mean_and_a_row_of_the_history(evaluating):
    evaluating.offer(20)
    assert evaluating.submitted == [(20, *rows) for rows in PARTS]
    assert list(evaluating.evaluator.completed()) == []
    assert evaluating.finish() == [EvaluatedVersion(1, 20, 2.0, 3 / ROWS)]
    assert not evaluating.evaluator.busy
    evaluating.evaluator.close()
    history = evaluating.directory.read_history("evaluation").load()
    assert (history.step.values.tolist(), history.loss.values.tolist()) == ([20], [2.0])


def test_without_classes_there_is_no_error_rate(evaluating):
    evaluating.offer(20)
    (found,) = evaluating.finish(wrong=math.nan)
    assert (found.loss, math.isnan(found.error)) == (2.0, True)


def test_without_validation_data_nothing_is_evaluated(tmp_path):
    evaluating = Evaluating(tmp_path, validation=None)
    evaluating.offer(100)
    assert not evaluating.evaluator.busy
    assert evaluating.submitted == []


def test_the_final_version_waits_for_the_one_under_way(evaluating):
    for version in (20, 40, 100):
        evaluating.offer(version)
    assert evaluating.versions == [20]
    assert [found.version for found in evaluating.finish()] == [20]
    assert [found.version for found in evaluating.finish()] == [100]
    assert not evaluating.evaluator.busy


@pytest.mark.parametrize("error", [LOST, KilledWorker("key", None, 3), OSError("no route")])
def test_a_lost_version_is_skipped(evaluating, error):
    evaluating.offer(20)
    evaluating.tasks.end(1, error)
    assert list(evaluating.evaluator.completed()) == []
    assert not evaluating.evaluator.busy
    evaluating.offer(40)
    assert [found.version for found in evaluating.finish()] == [40]


def test_a_lost_version_does_not_keep_the_final_one_waiting(evaluating):
    evaluating.offer(20)
    evaluating.offer(100)
    evaluating.tasks.end(1, LOST)
    assert list(evaluating.evaluator.completed()) == []
    assert [found.version for found in evaluating.finish()] == [100]
    assert not evaluating.evaluator.busy


def test_the_final_version_is_tried_three_times(evaluating):
    evaluating.offer(100)
    for _ in range(3):
        assert evaluating.evaluator.busy
        evaluating.tasks.end(0, LOST)
        assert list(evaluating.evaluator.completed()) == []
    assert evaluating.versions == [100, 100, 100]
    assert not evaluating.evaluator.busy


def test_an_error_of_the_model_ends_the_run(evaluating):
    evaluating.offer(20)
    evaluating.tasks.end(0, ValueError("shapes"))
    with pytest.raises(ValueError, match="shapes"):
        list(evaluating.evaluator.completed())
