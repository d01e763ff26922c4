"""Scoring tasks beside a plain loop of the norm engine in a process of its own.

    python benchmarks/scoring.py                          # both models, tasks of 0.1 s and of 1 s, about five minutes
    python benchmarks/scoring.py --model mlp --seconds 0.1 --cache 0 --profile tasks
    python benchmarks/scoring.py --tiny                   # what the tests run

The plain process has the system's environment, one torch thread and its tensors in RAM; it scores the same batches with
``NormEngine``. The tasks run on one worker under a nanny, submitted and collected as the coordinator does; client and
scheduler have the other core. Pairs in turn, medians. ``wall``: examples per second over those of the plain loop.
``cpu``: CPU seconds per example of the plain process over those of the worker's process, with all its threads.
``--cache 0`` reads and decodes the data in every pass, otherwise only the first, which is not measured, reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client, Nanny, Scheduler, SpecCluster
from torch import nn

import dask_isgd as isgd
from dask_isgd.checks.request import RunRequest, create, prepare
from dask_isgd.coordinator.in_flight import InFlightTasks
from dask_isgd.core import models
from dask_isgd.core.batch import Prepare
from dask_isgd.core.loss import cross_entropy
from dask_isgd.core.spec import RunSpec
from dask_isgd.norms import NormEngine
from dask_isgd.pipelines.models import mlp
from dask_isgd.runtime.placement import ScorerPool
from dask_isgd.scorer.task import ScoreReport, score
from dask_isgd.storage import Dataset, write_dataset

SIZES = {"mlp": (784, 512, 512, 512, 10), "wide": (3072, 2048, 2048, 2048, 2048, 10)}
ROWS = {"mlp": 163_840, "wide": 8_192}
CHUNK = {"mlp": 512, "wide": 64}
BATCH = 2048
ENVIRONMENT = dict(os.environ)
"""That of the plain process; a nanny changes the environment of its own process too (``MALLOC_TRIM_THRESHOLD_``)."""


def small() -> nn.Module:
    return mlp(SIZES["mlp"])


def large() -> nn.Module:
    return mlp(SIZES["wide"])


BUILD = {"mlp": small, "wide": large}


def make(folder: Path, name: str, rows: int) -> Dataset:
    """Write images of bytes, half of them zero so that they compress as real ones do, with a normalisation."""
    url = folder / f"{name}.zarr"
    if not url.exists():
        rng = np.random.default_rng(0)
        x = rng.integers(0, 256, (rows, SIZES[name][0]), np.uint8)
        x[:, ::2] = 0
        y = rng.integers(0, 10, len(x))
        write_dataset(
            url,
            "train",
            {"x": x, "y": y},
            inputs=["x"],
            target="y",
            chunk_size=CHUNK[name],
            classes=10,
            compressed=True,
            normalisation={"x": {"mean": 64.0, "std": 80.0}},
        )
    return Dataset(str(url), group="train")


def plain(name: str, data: Dataset, chunk: int, seconds: float) -> dict[str, float]:
    """Return examples per second and CPU seconds per example of a loop over tensors in RAM."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = data.load()
    inputs, targets = Prepare(data, torch.device("cpu"))(rows.inputs, rows.target)
    x = inputs[0]
    engine = NormEngine(BUILD[name](), cross_entropy)
    spans = [
        (first, min(first + BATCH, stop))
        for start in range(0, len(x), chunk)
        for stop in [min(start + chunk, len(x))]
        for first in range(start, stop, BATCH)
    ]
    engine(x[: spans[0][1]], targets[: spans[0][1]])
    for first, last in spans[: min(len(spans), 4)]:
        engine(x[first:last], targets[first:last])
    began, cpu, done = time.perf_counter(), time.process_time(), 0
    spans = [span for span in spans if span[0] < len(x) // chunk * chunk]
    for first, last in itertools.cycle(spans):
        engine(x[first:last], targets[first:last])[0].numpy()
        done += last - first
        if time.perf_counter() - began > seconds:
            break
    return {"per_second": done / (time.perf_counter() - began), "cpu": (time.process_time() - cpu) / done}


def worker_cpu() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_stime


def pin(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


class Driver:
    """Keeps two scoring tasks in flight, as the coordinator does for one scorer of one thread."""

    def __init__(self, client: Client, spec: RunSpec, placement: dict[str, Any]) -> None:
        self.client, self.spec, self.placement = client, spec, placement
        self.wake = threading.Event()
        self.tasks = InFlightTasks(client, 600.0, self.wake.set)
        self.chunks = itertools.cycle(range(spec.examples // spec.chunk))  # without a shorter last one
        self.parameters = client.scatter({"p": dict(models.state_of(models.build(spec.model, 0)))}, hash=False)["p"]

    def run(self, seconds: float, least: int = 2) -> dict[str, float]:
        """Score for ``seconds`` and ``least`` chunks after the first one, then let the others end; return the rates."""
        began, used, done = math.inf, (0.0, 0.0), 0
        reports: list[ScoreReport] = []
        self._submit()
        while time.perf_counter() - began < seconds or len(reports) < least:
            self.wake.wait(0.05)
            self.wake.clear()
            ended = [task.result for task in self.tasks.completed()]
            for report in ended:
                assert isinstance(report, ScoreReport), report
            self._submit()
            if began == math.inf:
                if ended:
                    began, used = time.perf_counter(), self._used()
                continue
            reports += ended
            done += sum(report.examples for report in ended)
            wall = time.perf_counter() - began
        total, system = (after - before for after, before in zip(self._used(), used, strict=True))
        while len(self.tasks):
            list(self.tasks.completed())
            time.sleep(0.01)
        task = statistics.median(report.seconds for report in reports)
        return {"per_second": done / wall, "cpu": total / done, "system": system / total, "task": task}

    def _submit(self) -> None:
        chunks = list(itertools.islice(self.chunks, 2 - len(self.tasks)))
        if not chunks:
            return
        futures = self.client.map(
            score,
            *zip(*((self.parameters, self.spec, c, 1, 0) for c in chunks), strict=True),
            key=[(f"score-{self.spec.run}", c, 1, 0, uuid.uuid4().hex[:8]) for c in chunks],
            pure=False,
            **self.placement,
        )
        for chunk, future in zip(chunks, futures, strict=True):
            self.tasks.launch(chunk, future, (1, 0))

    def _used(self) -> tuple[float, float]:
        (found,) = self.client.run(worker_cpu).values()
        return found


@contextlib.contextmanager
def opened(core: int, threads: int) -> Iterator[Client]:
    options = {
        "nthreads": threads,
        "resources": {"scorer": threads},
        "host": "127.0.0.1",
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": 40,
        "env": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])},
    }
    with (
        SpecCluster(  # type: ignore[no-untyped-call]
            workers={"scorer": {"cls": Nanny, "options": options}},
            scheduler={
                "cls": Scheduler,
                "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
            },
            silence_logs=40,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(1)
        client.run(pin, {core})
        yield client


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), action="append")
    parser.add_argument("--seconds", type=float, action="append", help="seconds per task")
    parser.add_argument("--cache", default="1GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--window", type=float, default=6.0, help="seconds of each measurement")
    parser.add_argument("--profile", help="file for py-spy's profile of the worker")
    parser.add_argument("--py-spy", nargs="*", default=[], help="further options of py-spy, such as --gil")
    parser.add_argument("--tiny", action="store_true", help="what the tests run")
    parser.add_argument("--plain", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.plain:
        name, url, chunk, seconds = options.plain
        print(json.dumps(plain(name, Dataset(url, group="train"), int(chunk), float(seconds))))
        return []
    if options.tiny:
        options.model, options.seconds, options.repeats, options.window = ["mlp"], [0.1], 1, 0.2
    cores = sorted(os.sched_getaffinity(0))
    results = []
    with tempfile.TemporaryDirectory() as temporary, opened(cores[-1], 1) as client:
        pin({cores[0]})  # the processes that it starts choose their own
        for name in options.model or list(SIZES):
            data = make(Path(temporary), name, 2048 if options.tiny else ROWS[name])
            for seconds in options.seconds or (0.1, 1.0):
                rate = bare(name, data, len(data), 2.0, cores[-1])["per_second"]
                unit = data.chunk_size
                chunk = unit * max(1, min(round(rate * seconds / unit), data.n_chunks // 4))
                results.append(measure(client, name, data, chunk, options, Path(temporary), cores[-1]))
                print(json.dumps(results[-1]), flush=True)
    return results


def bare(name: str, data: Dataset, chunk: int, seconds: float, core: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--plain", name, data.url, str(chunk), str(seconds)]
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=ENVIRONMENT, preexec_fn=lambda: os.sched_setaffinity(0, {core})
    )
    return json.loads(found.stdout)


def measure(
    client: Client, name: str, data: Dataset, chunk: int, options: argparse.Namespace, folder: Path, core: int
) -> dict[str, Any]:
    run_dir = folder / uuid.uuid4().hex
    scoring = isgd.Scoring(chunk_size=chunk, cache_memory=options.cache, batch_size=BATCH)
    plan = prepare(
        RunRequest(model=BUILD[name], data=data, run_dir=run_dir, learning=isgd.Learning(steps=1), scoring=scoring)
    )
    create(plan)
    driver = Driver(client, plan.spec, ScorerPool(client, scoring).placement())
    driver.run(0.0, plan.spec.n_chunks)
    pairs = [
        {"plain": bare(name, data, chunk, options.window, core), "tasks": driver.run(options.window)}
        for _ in range(options.repeats)
    ]
    if options.profile:
        (pid,) = client.run(os.getpid).values()
        thread = threading.Thread(target=driver.run, args=(options.window + 2,))
        thread.start()
        command = ["py-spy", "record", "-p", pid, "-d", int(options.window), "-r", 200, "-t", "-f", "raw"]
        command += ["-o", f"{options.profile}-{name}-{chunk}.txt", *options.py_spy]
        subprocess.run([str(part) for part in command], check=True)
        thread.join()

    def median(value: Any) -> float:
        return round(statistics.median(value(p) for p in pairs), 4)

    return {
        "model": name,
        "chunk": chunk,
        "cache": options.cache,
        "task_seconds": median(lambda p: p["tasks"]["task"]),
        "plain_per_second": median(lambda p: p["plain"]["per_second"]),
        "wall": median(lambda p: p["tasks"]["per_second"] / p["plain"]["per_second"]),
        "cpu": median(lambda p: p["plain"]["cpu"] / p["tasks"]["cpu"]),
        "plain_ms": median(lambda p: 1e3 * chunk / p["plain"]["per_second"]),
        "system": median(lambda p: p["tasks"]["system"]),
    }


if __name__ == "__main__":
    main()
