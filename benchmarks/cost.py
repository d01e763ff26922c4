"""The cost of the system: the learner's step, a scoring task, a publication, Dask's share of a task.

    python benchmarks/cost.py           # about four minutes on two cores
    python benchmarks/cost.py --tiny    # what the tests run

Compared in one run on pinned cores, interleaved, medians of the repeats:

* ``learner``: steps per second of the learner inside a run (core 0, one torch thread; scheduler, scorer
  and client on core 1) over those of a bare torch loop in the same process (core 0, one torch thread,
  nothing else running), on tensors in RAM, same model, optimizer, minibatch, uniform indices drawn
  with numpy, gradient buffers reused. ``uniform`` is the run with uniform draws and no scoring.
* ``scoring``: examples per second inside scoring tasks over those of a bare loop over the same chunks
  in the same process: open array, read, norms.
* ``learner_beside`` and ``scoring_beside``: the same over the two bare loops while both run, each on its
  core, as learner and scorer do: cores of one machine share caches and memory, which no software can change.
* ``publication``: milliseconds for which one publication blocks the learner's loop.
* ``dask``: milliseconds of a scoring task that are neither reading nor scoring, from a sequence of tasks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client, get_worker
from torch import nn

import dask_isgd as isgd
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.loss import cross_entropy
from dask_isgd.learner.snapshots import Snapshots
from dask_isgd.norms import NormEngine
from dask_isgd.pipelines.models import mlp
from dask_isgd.storage import Dataset, write_dataset

BATCH = 128
SIZES = {"784-512x3-10": (784, 512, 512, 512, 10), "3072-2048x4-10": (3072, 2048, 2048, 2048, 2048, 10)}


def small() -> nn.Module:
    return mlp(SIZES["784-512x3-10"])


def large() -> nn.Module:
    return mlp(SIZES["3072-2048x4-10"])


MODELS = {"784-512x3-10": small, "3072-2048x4-10": large}


def make(folder: Path, width: int, rows: int) -> Dataset:
    """Write random inputs of a width, with ten classes decided by a linear map, so that there is something to learn."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, width), np.float32)
    y = (x @ rng.standard_normal((width, 10), np.float32)).argmax(1)
    url = str(folder / f"{width}.zarr")
    arrays = {"x": x, "y": y.astype(np.int64)}
    write_dataset(url, "train", arrays, inputs=["x"], target="y", chunk_size=512, classes=10)
    return Dataset(url, group="train")


def pin(cores: set[int]) -> None:
    """Pin every thread of this process."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue


def bare_training(data: Dataset, name: str, steps: int) -> float:
    """Return steps per second of a plain loop on tensors in RAM; runs on the learner's worker."""
    torch.set_num_threads(1)
    rows = data.load()
    x, y = torch.from_numpy(rows.inputs[0]), torch.from_numpy(rows.target)
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    rng = np.random.default_rng(0)
    began = 0.0
    for step in range(steps + steps // 4):
        if step == steps // 4:
            began = time.perf_counter()
        chosen = torch.from_numpy(rng.integers(0, len(y), BATCH))
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return steps / (time.perf_counter() - began)


def bare_scoring(data: Dataset, name: str, chunk: int, batch: int, until: str | None = None) -> float:
    """Return examples per second of a plain scan: read, norms; runs on a scorer.

    It reads the data once, or repeatedly until the file ``until`` exists.
    """
    torch.set_num_threads(1)
    model = MODELS[name]()
    engine, prepare = NormEngine(model, cross_entropy), Prepare(data, torch.device("cpu"))
    warm = data.read(0, min(batch, len(data)))
    inputs, targets = prepare(warm.inputs, warm.target)
    engine(inputs[0], targets)
    began, done = time.perf_counter(), 0
    for start in itertools.chain.from_iterable(itertools.repeat(range(0, len(data), chunk))):
        if done >= len(data) if until is None else os.path.exists(until):
            break
        rows = data.read(start, min(len(data), start + chunk))
        for first in range(0, len(rows.target), batch):
            part = slice(first, first + batch)
            inputs, targets = prepare((rows.inputs[0][part],), rows.target[part])
            engine(inputs[0], targets)[0].numpy()
        done += len(rows.target)
    return done / (time.perf_counter() - began)


def system(client: Client, data: Dataset, name: str, folder: Path, steps: int, *, uniform: bool) -> dict[str, float]:
    """Return steps per second of a run's learner, and examples per busy second of its scorers."""
    learning = isgd.Learning(
        steps=steps + steps // 4,
        batch_size=BATCH,
        learning_rate=1e-3,
        threads=1,
        report_every=10,
        clip_mean_factor=None,
    )
    sampling = isgd.Sampling(gate="open", uniform=uniform)
    client.get_task_stream(count=1)
    began = time.time()
    run = isgd.fit(client, MODELS[name], data, folder, learning=learning, sampling=sampling)
    run.wait(timeout=900)
    history = run.history
    late = history.isel(report=slice(len(history.step) // 5, None))
    seconds = float(late.seconds[-1] - late.seconds[0])
    tasks = [r for r in client.get_task_stream(start=began) if str(r["key"]).startswith("('score-")]
    busy = sum(s["stop"] - s["start"] for r in tasks for s in r["startstops"] if s["action"] == "compute")
    examples = run.summary()["examples_scored"]
    return {
        "steps_per_second": float(late.step[-1] - late.step[0]) / seconds,
        "scored_per_busy_second": examples / busy if busy else 0.0,
        "chunk": float(run.document["chunk"]),
    }


def publication(name: str, times: int) -> dict[str, float]:
    """Return milliseconds that the loop needs to copy a publication: the first, and the median with reused buffers."""
    state, snapshots, seconds = models.state_of(MODELS[name]()), Snapshots(), []
    for _ in range(times):
        began = time.perf_counter()
        held = snapshots.take(state)
        seconds.append(time.perf_counter() - began)
        size = sum(t.numel() * t.element_size() for t in held.values())
        del held
    return {
        "megabytes": round(size / 1e6, 1),
        "first_ms": round(1e3 * seconds[0], 1),
        "median_ms": round(1e3 * statistics.median(seconds[1:]), 1),
    }


def _nothing(chunk: int, nonce: str) -> str:
    return get_worker().address


def dask_share(client: Client, tasks: int) -> float:
    """Return milliseconds per empty task, submitted as the coordinator does."""
    began = time.perf_counter()
    futures = [
        client.submit(_nothing, i, str(began), key=("nothing", i, str(began)), pure=False, resources={"scorer": 1})
        for i in range(tasks)
    ]
    client.gather(futures)
    return 1e3 * (time.perf_counter() - began) / tasks


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    names = ["784-512x3-10"] if options.tiny else list(SIZES)
    steps = {"784-512x3-10": 40 if options.tiny else 1200, "3072-2048x4-10": 60}
    rows = {"784-512x3-10": 1024 if options.tiny else 20_480, "3072-2048x4-10": 8_192}
    repeats = 1 if options.tiny else options.repeats
    result: dict[str, Any] = {"cores": os.cpu_count(), "batch": BATCH, "repeats": repeats, "models": {}}
    everywhere = os.sched_getaffinity(0)
    cores = sorted(everywhere)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pin({cores[-1]})
        try:
            with isgd.LocalCluster(2) as cluster, cluster.get_client() as client:
                workers = client.scheduler_info(n_workers=-1)["workers"]
                learner = next(a for a, w in workers.items() if "learner" in w["resources"])
                scorer = next(a for a in workers if a != learner)
                client.run(pin, {cores[0]}, workers=[learner])
                client.run(pin, {cores[-1]}, workers=[scorer])
                for name in names:
                    data = make(folder, SIZES[name][0], rows[name])
                    pairs = []
                    for k in range(repeats):
                        pair: dict[str, float] = {}
                        train = partial(
                            client.submit, bare_training, data, name, steps[name], resources={"learner": 1}, pure=False
                        )
                        scan = partial(
                            client.submit, bare_scoring, data, name, resources={"scorer": 1}, pure=False, batch=2048
                        )
                        pair["bare"] = train().result(timeout=900)
                        for kind in ("importance", "uniform"):
                            run_dir = folder / f"{name}-{k}-{kind}"
                            found = system(client, data, name, run_dir, steps[name], uniform=kind == "uniform")
                            pair[kind] = found["steps_per_second"]
                            if kind == "importance":
                                chunk = int(found["chunk"])
                                pair["scored"] = found["scored_per_busy_second"]
                                pair["scan"] = scan(chunk=chunk).result(timeout=900)
                                trained = run_dir / "trained"
                                beside = scan(chunk=chunk, until=str(trained))
                                pair["bare_beside"] = train().result(timeout=900)
                                trained.touch()
                                pair["scan_beside"] = beside.result(timeout=900)
                        pairs.append(pair)

                    def median(top: str, below: str, pairs: list[dict[str, float]] = pairs) -> float:
                        return round(statistics.median(p[top] / p[below] for p in pairs), 3)

                    result["models"][name] = {
                        "bare_steps_per_second": round(statistics.median(p["bare"] for p in pairs), 2),
                        "learner": median("importance", "bare"),
                        "uniform": median("uniform", "bare"),
                        "scoring": median("scored", "scan"),
                        "learner_beside": median("importance", "bare_beside"),
                        "scoring_beside": median("scored", "scan_beside"),
                    }
                result["dask_ms_per_task"] = round(dask_share(client, 50 if options.tiny else 500), 2)
        finally:
            pin(everywhere)
    result["publication"] = publication(names[-1], 3 if options.tiny else 15)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
