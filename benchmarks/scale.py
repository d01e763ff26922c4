"""Hundreds of scorers on one machine: whether the coordinator keeps them busy, and at what cost.

    python benchmarks/scale.py                    # 64 and 256 threads, about eight minutes
    python benchmarks/scale.py --threads 64 --seconds 20
    python benchmarks/scale.py --tiny             # what the tests run

Scorers are threads of one process whose scoring tasks wait for a second (``stubs.py``) and write
nothing. Learner, coordinator and scorers have one process each; the scheduler shares the client's. With
the same processes and the same learner, alternately:

* ``ours``: a run with its coordinator;
* ``bare``: the same run, whose coordinator scores nothing, and a bare loop of Dask (submit, wait,
  submit) in the coordinator's process that keeps as many stubs in flight.

``busy``: share of the threads' time in stubs. ``coordinator ms/task``: CPU time of the coordinator's
process, all its threads, per task. ``learner``: its steps per second in ``ours`` over those in the next
``bare`` window. All are medians over the windows, with the smallest and the largest ratio of a pair. ``cpu``:
cores that each process keeps busy. If the machine has fewer cores, the learner waits for one; ``ms/step``,
the CPU time of its loop, is the cost of a step without waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from distributed import Client, Nanny, Scheduler, SpecCluster, get_client, secede
from torch import nn

import dask_isgd as isgd
from dask_isgd.pipelines.models import mlp
from dask_isgd.storage import Dataset, WeightArray, write_dataset

HERE = str(Path(__file__).parent)
ROWS = 16
"""Examples per scoring chunk; few, because weights are not measured."""


def model() -> nn.Module:
    return mlp((784, 512, 512, 512, 10))


def data(folder: Path, chunks: int) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((chunks * ROWS, 784), np.float32)
    y = rng.integers(0, 10, len(x))
    url = str(folder / "data.zarr")
    write_dataset(url, "train", {"x": x, "y": y}, inputs="x", target="y", chunk_size=ROWS, classes=10)
    return Dataset(url, group="train")


def cluster(threads: int) -> SpecCluster:
    """Return a cluster of the learner's and the coordinator's workers; the scorers' worker is added later."""

    def worker(nthreads: int, resources: dict[str, float]) -> dict[str, Any]:
        env = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])}
        options = {"nthreads": nthreads, "resources": resources, "env": env, "memory_limit": 0}
        return {
            "cls": Nanny,
            "options": {
                **options,
                "host": "127.0.0.1",
                "dashboard": False,
                "dashboard_address": "127.0.0.1:0",
                "silence_logs": 40,
            },
        }

    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    return SpecCluster(  # type: ignore[no-untyped-call]
        workers={"learner": worker(2, {"learner": 1}), "coordinator": worker(2, {"helper": 1})},
        scheduler={"cls": Scheduler, "options": options},
        worker=worker(threads, {"scorer": threads}),
        silence_logs=40,
    )


def use_stubs(scoring: bool) -> None:
    """Replace the coordinator's scoring tasks with stubs, or disable them; runs in its process."""
    import stubs

    from dask_isgd.coordinator import task as coordinator
    from dask_isgd.runtime import placement

    coordinator.score = stubs.score
    if not hasattr(placement.ScorerPool, "_capacity"):
        placement.ScorerPool._capacity = placement.ScorerPool.capacity
    placement.ScorerPool.capacity = placement.ScorerPool._capacity if scoring else lambda self: 0


def bare_loop(in_flight: int, seconds: float) -> int:
    """Keep ``in_flight`` stubs in flight, submitting as many at once as have completed; return how many completed."""
    import stubs

    client, over, completed = get_client(), queue.SimpleQueue(), 0
    secede()
    futures: dict[int, Any] = {}

    def launch(count: int) -> None:
        numbers = list(range(completed + len(futures), completed + len(futures) + count))
        submitted = client.map(stubs.bare, numbers, pure=False, resources={"scorer": 1})
        for number, future in zip(numbers, submitted, strict=True):
            futures[number] = future
            future.add_done_callback(lambda _, number=number: over.put(number))

    launch(in_flight)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done = [over.get()]
        while not over.empty():
            done.append(over.get())
        for number in done:
            futures.pop(number).result()
        completed += len(done)
        launch(len(done))
    client.cancel(list(futures.values()))
    return completed


def cpu() -> tuple[float, float]:
    """Return the CPU seconds of this process, and of its busiest thread: on the learner's worker its loop."""
    threads = [thread.user_time + thread.system_time for thread in psutil.Process().threads()]
    return time.process_time(), max(threads)


def busy(since: float, until: float) -> float:
    import stubs

    return stubs.busy(since, until)


def wait_until_busy(client: Client, where: dict[str, str], low: float = 0.0, high: float = float("inf")) -> None:
    """Wait until the stubs were busy for between ``low`` and ``high`` seconds of the last second."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = time.time()
        (found,) = client.run(busy, now - 2, now - 1, workers=[where["scorers"]]).values()
        if low <= found <= high:
            return
    raise TimeoutError(f"got {found:g} s of stubs per second, wanted between {low:g} and {high:g} within a minute")


def measure(client: Client, where: dict[str, str], run: isgd.Run, threads: int, seconds: float) -> dict[str, float]:
    """Return shares and rates over one window."""

    def on(name: str, function: Any, *args: Any) -> Any:
        return client.run(function, *args, workers=[where[name]])[where[name]]

    def used() -> dict[str, tuple[float, float]]:
        return {"scheduler": cpu(), **{name: on(name, cpu) for name in ("learner", "coordinator", "scorers")}}

    began, first, cpu_first = time.time(), run.latest["step"], used()
    step_began = time.monotonic()
    time.sleep(seconds)
    ended, last, cpu_last = time.time(), run.latest["step"], used()
    step_seconds = time.monotonic() - step_began
    time.sleep(1.5)  # until stubs that began in the window have ended
    tasks = on("scorers", busy, began, ended)  # a second each
    spent = {name: cpu_last[name][0] - cpu_first[name][0] for name in cpu_first}
    return {
        "busy": tasks / (threads * (ended - began)),
        "tasks_per_second": tasks / (ended - began),
        "coordinator_ms_per_task": 1e3 * spent["coordinator"] / max(1.0, tasks),
        "steps_per_second": (last - first) / step_seconds,
        "learner_cpu_ms_per_step": 1e3 * (cpu_last["learner"][1] - cpu_first["learner"][1]) / max(1, last - first),
        **{f"cpu_{name}": seconds / step_seconds for name, seconds in spent.items()},
    }


def compare(threads: int, seconds: float, repeats: int) -> dict[str, Any]:
    """Measure ``ours`` and ``bare`` alternately."""
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(threads) as made,
        Client(made) as client,
    ):
        dataset = data(Path(folder), 6 * threads)
        learning = isgd.Learning(steps=10**9, batch_size=128, publish_every=32, threads=1, checkpoint_seconds=3600)
        scoring = isgd.Scoring(chunk_size=ROWS)
        client.run(use_stubs, False)
        run = isgd.fit(client, model, dataset, Path(folder) / "run", learning=learning, scoring=scoring,
                       sampling=isgd.Sampling(gate="open"))  # fmt: skip
        weights = WeightArray.open(run.directory.weights)
        for chunk in range(weights.n_chunks):
            weights.write(chunk, np.ones(ROWS, np.float32))
        while run.latest["step"] < 32:
            time.sleep(0.1)
        made.scale(3)
        client.wait_for_workers(3, timeout=60)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        where = {str(w["name"]): address for address, w in workers.items()}
        where["scorers"] = next(a for name, a in where.items() if name not in ("learner", "coordinator"))
        rows: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
        for _ in range(repeats):
            client.run(use_stubs, True, workers=[where["coordinator"]])
            wait_until_busy(client, where, low=0.5 * threads)
            rows["ours"].append(measure(client, where, run, threads, seconds))
            client.run(use_stubs, False, workers=[where["coordinator"]])
            wait_until_busy(client, where, high=0.0)
            loop = client.submit(
                bare_loop, 2 * threads, seconds + 8, pure=False, workers=[where["coordinator"]], priority=30
            )
            wait_until_busy(client, where, low=0.5 * threads)
            rows["bare"].append(measure(client, where, run, threads, seconds))
            loop.result(timeout=60)
        run.stop(timeout=60)
    medians = {
        name: {key: float(np.median([row[key] for row in found])) for key in found[0]} for name, found in rows.items()
    }
    ratios = [a["steps_per_second"] / b["steps_per_second"] for a, b in zip(rows["ours"], rows["bare"], strict=True)]
    return {"threads": threads, **medians, "learner": float(np.median(ratios)), "pairs": sorted(ratios)}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append", help="scorers (repeatable; default: 64 and 256)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each window")
    parser.add_argument("--repeats", type=int, default=9, help="number of pairs of windows")
    parser.add_argument("--tiny", action="store_true", help="four threads, two seconds: a test that it runs")
    options = parser.parse_args(argv)
    if options.tiny:
        options.threads, options.seconds, options.repeats = [4], 2.0, 1
    results = []
    for threads in options.threads or [64, 256]:
        found = compare(threads, options.seconds, options.repeats)
        results.append(found)
        print(json.dumps(found))
        for name in ("ours", "bare"):
            row = found[name]
            print(
                f"{threads:4d} threads  {name}  busy {row['busy']:.3f}  tasks/s {row['tasks_per_second']:6.1f}  "
                f"coordinator {row['coordinator_ms_per_task']:.2f} ms/task  "
                f"learner {row['steps_per_second']:.1f} steps/s, {row['learner_cpu_ms_per_step']:.1f} ms/step"
            )
            print(f"{threads:4d} threads  {name}  cpu " + ", ".join(
                f"{key[4:]} {value:.2f}" for key, value in row.items() if key.startswith("cpu_")
            ))  # fmt: skip
        low, high = found["pairs"][0], found["pairs"][-1]
        print(f"{threads:4d} threads  learner, ours over bare: {found['learner']:.3f} ({low:.3f} to {high:.3f})")
    return results


if __name__ == "__main__":
    main()
