"""Page faults of a training step in a process whose environment is that of a Dask worker."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dask_isgd.runtime.allocator import EXPORT, MOST_KEPT

STEPS = """
import json, resource, sys, threading, torch
from torch import nn
if sys.argv[1] == "kept":
    from dask_isgd.runtime.allocator import keep_freed_memory
    assert keep_freed_memory(2**32)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
x = torch.randn(64, 784)

def steps(n):
    for _ in range(n):
        model.zero_grad()
        model(x).square().mean().backward()

def measure():
    steps(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(50)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50))

thread = threading.Thread(target=measure)  # as a Dask task: not in the main thread, whose heap is another one
thread.start()
thread.join()
"""


def faults_per_step(how: str) -> float:
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEPS, how]
    return float(
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120).stdout)
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_a_step_faults_its_memory_in_no_more():
    as_the_nanny_sets_it, kept = faults_per_step("as it is"), faults_per_step("kept")
    assert as_the_nanny_sets_it > 100
    assert kept < 0.1 * as_the_nanny_sets_it


def test_the_line_for_workers_changes_one_of_the_variables_that_nannies_set():
    code = "import json, dask, distributed; print(json.dumps(dask.config.get('distributed.nanny.pre-spawn-environ')))"
    command = f'{EXPORT}\n{sys.executable} -c "{code}"'
    found = json.loads(subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120).stdout)
    assert found["MALLOC_TRIM_THRESHOLD_"] == str(MOST_KEPT)
    assert found["OMP_NUM_THREADS"] == 1


def test_a_documented_line_is_this_one():
    assert EXPORT in (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
