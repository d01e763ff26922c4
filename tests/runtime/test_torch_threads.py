"""torch threads by role: a learner's setting stands against the scoring tasks of its process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dask_isgd.runtime import torch_threads


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_scoring_tasks_set_the_threads_of_a_process_without_a_learner():
    for threads in (1, 2):
        torch_threads.start_scorer(threads)
        assert torch.get_num_threads() == threads


def test_scoring_tasks_leave_the_threads_alone_until_the_last_learner_has_ended():
    torch_threads.start_learner(2)
    torch_threads.start_learner(3)
    torch_threads.start_scorer(1)
    assert torch.get_num_threads() == 3
    assert torch_threads.resize_learner(4) == torch.get_num_threads() == 4
    torch_threads.end_learner()
    torch_threads.start_scorer(1)
    assert torch.get_num_threads() == 4
    torch_threads.end_learner()
    torch_threads.start_scorer(1)
    assert torch.get_num_threads() == 1
