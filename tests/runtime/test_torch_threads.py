"""torch threads by role: a learner's setting stands against the scoring tasks of its process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dask_isgd.runtime import torch_threads
from dask_isgd.runtime.machine_load import MachineLoad


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
    with torch_threads.LearnerThreads(2):
        with torch_threads.LearnerThreads(3) as second:
            torch_threads.start_scorer(1)
            assert torch.get_num_threads() == 3
            assert second.resize(scorers_idle=True) == torch.get_num_threads() == 3
        torch_threads.start_scorer(1)
        assert torch.get_num_threads() == 3
    torch_threads.start_scorer(1)
    assert torch.get_num_threads() == 1


class Load(MachineLoad):
    """A machine with a number of free cores."""

    def __init__(self, free: int) -> None:
        self.free = free

    def threads(self, wanted: int) -> int:
        return max(1, min(wanted, self.free))


@pytest.mark.parametrize(("free", "busy", "idle"), [(8, 2, 5), (4, 2, 4), (1, 1, 1)])
def test_a_learner_takes_what_idle_scorers_leave_as_far_as_the_machine_has_it(free, busy, idle):
    with torch_threads.LearnerThreads(2, 3, Load(free)) as threads:
        assert threads.resize(scorers_idle=False) == torch.get_num_threads() == busy
        assert threads.resize(scorers_idle=True) == torch.get_num_threads() == idle
