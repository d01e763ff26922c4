"""The memory of learner, scorer, coordinator and scheduler over many steps, each in a process of its own.

    python benchmarks/memory.py                   # 120,000 steps, into results/memory.json
    python benchmarks/memory.py --tiny            # what the tests run: a few steps, nothing written

A small model takes some hundred steps per second, so that whatever grows per step, version, report, event or scored
chunk grows fast. Every ``--every`` steps the resident memory of each process is read; at ten moments each process
also counts Python's blocks and the bytes that the C library's heap holds, which tells a leak from a heap that is only
badly filled. Prints the slope of each process in MB per 10,000 steps after the first ``--settle`` steps, by least
squares, and fails if one is above 1 MB.

Dask has its default settings. It keeps the last 1,000 events of a topic, as many transitions and messages, and an hour
of samples of its system monitor: these fill up meanwhile and are part of the slopes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from apart import Apart
from distributed import Client

import dask_isgd as isgd
from dask_isgd.pipelines import PIPELINES

RESULT = Path(__file__).parent / "results" / "memory.json"
ROLES = ("learner", "scorer", "coordinator", "scheduler")
MOST = 1.0
"""MB per 10,000 steps that a process may grow by."""
_SECONDS = 300.0
_CENSUSES = 10
_HEAP = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120_000)
    parser.add_argument("--settle", type=int, default=20_000, help="steps that do not count")
    parser.add_argument("--every", type=int, default=1_000, help="steps between two readings")
    parser.add_argument("--to", type=Path, default=RESULT, help="file for the readings, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a few steps, judge and write nothing: a test that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.steps, options.settle, options.every = 600, 200, 50
    with tempfile.TemporaryDirectory() as folder, Apart(Path(folder)) as cluster:
        readings, censuses, seconds = follow(cluster, Path(folder), options.steps, options.every)
    slopes = {role: slope(readings, role, options.settle) for role in ROLES}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "MB per 10,000 steps": {role: round(value, 3) for role, value in slopes.items()},
        "readings, MB": readings,
        "censuses": censuses,
    }
    for role in ROLES:
        first, last = readings[0][role], readings[-1][role]
        print(f"{role:<12}{slopes[role]:8.2f} MB per 10,000 steps, {first:.1f} MB at first, {last:.1f} MB at last")
    if not options.tiny:
        options.to.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{options.steps} steps in {seconds:.0f} s, written to {options.to}")
        if growing := [role for role, value in slopes.items() if value > MOST]:
            sys.exit(f"memory grows by more than {MOST:g} MB per 10,000 steps: {', '.join(growing)}")
    return result


def follow(
    cluster: Apart, folder: Path, steps: int, every: int
) -> tuple[list[dict[str, float]], list[dict[str, Any]], float]:
    """Train; return the readings of resident memory in MB, the censuses, and the seconds of training."""
    data = isgd.Dataset(PIPELINES["digits"].prepare(str(folder / "digits.zarr")), group="train")
    cluster.worker("learner=1", threads=2)
    cluster.worker("coordinator=1")
    client = cluster.client()
    client.wait_for_workers(2, timeout=_SECONDS)
    learning = isgd.Learning(steps=10**8, batch_size=32, threads=1)
    model = "dask_isgd.pipelines.models:digits"
    run = isgd.fit(client, model, data, folder / "run", learning=learning, sampling=isgd.Sampling(gate="open"))
    cluster.worker("scorer=1")  # only now: the coordinator has a process of its own
    readings, censuses = list[dict[str, float]](), list[dict[str, Any]]()
    first, began = 0, 0.0
    for latest in run.watch():
        if not latest.get("examples_scored"):
            continue
        first, began = first or latest["step"], began or time.monotonic()
        step, seconds = latest["step"] - first, round(time.monotonic() - began, 1)
        if step >= len(readings) * every:
            processes = processes_of(client, run)
            resident = {role: psutil.Process(pid).memory_info().rss / 1e6 for role, (_, pid) in processes.items()}
            readings.append({"step": step, "seconds": seconds, **resident})
        if step >= len(censuses) * steps / _CENSUSES:
            counted = {role: census_of(client, address) for role, (address, _) in processes_of(client, run).items()}
            censuses.append({"step": step, **counted})
        if step >= steps:
            break
    if run.stop(timeout=_SECONDS) != "stopped":
        run.wait(timeout=_SECONDS)  # raises what ended the run
    return readings, censuses, seconds


def processes_of(client: Client, run: isgd.Run) -> dict[str, tuple[str, int]]:
    """Return the address and the process of the worker of each role; the scheduler has no address."""
    found = {}
    for role in ("learner", "coordinator"):
        leases = run.directory.leases(role)
        owner = leases.owner(leases.highest())
        found[role] = owner["address"], owner["pid"]
    workers = client.scheduler_info(n_workers=-1)["workers"]
    scorer = next(address for address, worker in workers.items() if "scorer" in worker["resources"])
    found["scorer"] = scorer, client.run(os.getpid, workers=[scorer])[scorer]
    found["scheduler"] = "", client.run_on_scheduler(os.getpid)
    return found


def census_of(client: Client, address: str) -> dict[str, Any]:
    """Return the census of a worker, or of the scheduler."""
    found = client.run(census, workers=[address])[address] if address else client.run_on_scheduler(census)
    return dict(found)


def census() -> dict[str, Any]:
    """Count the blocks of Python's objects in this process, and the megabytes that its heap holds and keeps free.

    Not the objects themselves: ``gc.get_objects`` takes hold of tuples that other threads are making, which then fail
    with a SystemError.
    """
    import ctypes
    import sys

    fields = [(name, ctypes.c_size_t) for name in _HEAP]

    class Heap(ctypes.Structure):
        """mallinfo2 of glibc, 2.33 and later."""

        _fields_ = fields

    found: dict[str, Any] = {}
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:
        mallinfo.restype = Heap
        heap = mallinfo()
        found |= {"heap, MB": round((heap.uordblks + heap.hblkhd) / 1e6, 2), "free, MB": round(heap.fordblks / 1e6, 2)}
    return found | {"blocks": sys.getallocatedblocks()}


def slope(readings: list[dict[str, float]], role: str, settle: int) -> float:
    """Return the MB per 10,000 steps by which a process grows after ``settle`` steps, by least squares.

    NaN if all readings were taken at one step.
    """
    counted = [reading for reading in readings if reading["step"] >= settle]
    steps, resident = (np.array([reading[name] for reading in counted]) for name in ("step", role))
    away = (steps - steps.mean()) / 10_000
    spread = float(away @ away)
    return float(away @ resident) / spread if spread else math.nan


if __name__ == "__main__":
    main()
