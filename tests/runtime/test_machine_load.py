"""How many threads have a core to themselves."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from dask_isgd.runtime.machine_load import MachineLoad, Usage


class Machine:
    """A machine whose processes take ``others`` and ``own`` cores."""

    def __init__(self) -> None:
        self.now = self.all = self.own = 0.0

    def usage(self) -> Usage:
        return Usage(self.all, self.own)

    def run(self, seconds: float, *, others: float, own: float) -> None:
        self.now += seconds
        self.all += seconds * (others + own)
        self.own += seconds * own


@pytest.mark.parametrize(
    ("cores", "wanted", "others", "own", "threads"),
    [
        (2, 2, 0.0, 2.0, 2),
        (2, 2, 0.2, 1.8, 2),
        (2, 2, 0.6, 1.4, 1),
        (2, 2, 2.0, 0.0, 1),
        (2, 1, 0.0, 1.0, 1),
        (16, 8, 6.0, 8.0, 8),
        (16, 8, 11.0, 5.0, 5),
        (16, 8, 16.0, 0.0, 1),
    ],
)
def test_threads_get_the_cores_that_others_leave(cores, wanted, others, own, threads):
    machine = Machine()
    load = MachineLoad(cores, read=machine.usage, clock=lambda: machine.now)
    assert load.threads(wanted) == min(wanted, cores), "nothing is known yet"
    machine.run(1.5, others=others, own=own)
    assert load.threads(wanted) == threads
    machine.run(1.5, others=0.0, own=own)
    assert load.threads(wanted) == min(wanted, cores), "the others have ended"


def test_the_load_is_measured_once_per_second_at_most():
    machine = Machine()
    load = MachineLoad(2, read=machine.usage, clock=lambda: machine.now)
    machine.run(0.9, others=2.0, own=0.0)
    assert load.threads(2) == 2
    machine.run(0.2, others=2.0, own=0.0)
    assert load.threads(2) == 1


def test_a_busy_process_of_this_machine_is_noticed():
    load = MachineLoad()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load.cores)]
    try:
        deadline = time.monotonic() + 60
        while load.threads(load.cores) > max(1, load.cores // 2) and time.monotonic() < deadline:
            time.sleep(0.1)  # CPU time passes only by itself
        assert load.threads(load.cores) <= max(1, load.cores // 2)
    finally:
        for process in busy:
            process.kill()
            process.wait()
