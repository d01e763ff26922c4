"""Exact norms against a training step: the step's time over that of every method that computes the norms.

A training step is forward and backward of the mean loss with reused gradient buffers; zeroing them and the
optimizer's step are not included. One thread, CPU seconds, medians of repeats in shuffled order. To run it::

    pip install -e .[bench]
    python benchmarks/norms.py [--tiny] [--repeats 15] [--only mlp resnet] [--malloc default]
    pip install timm transformers
    python benchmarks/norms.py --zoo [swin t5] [--tiny] [--repeats 15] [--json norms_zoo.json]

``--zoo`` measures architectures that people use (``norms_zoo.py``): it asserts that their norms are autograd's, and
prints the ratio of each.

By default the C library is configured to keep freed memory (as it does in a process that trains for long): with its
default settings, temporaries of tens of megabytes are returned to the kernel and faulted in again in every step, which
slows down methods that form weight gradients and favours methods that do not.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import norms_zoo
import torch
from norms_models import Workload, workloads
from norms_peers import usable
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from dask_isgd.norms import NormEngine, capture_norms

METHODS = ("exact", "bound", "loss")
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; ``ratio`` is the training step's seconds over this line's."""

    name: str
    milliseconds: float
    ratio: float
    faults: float
    """Pages faulted in, median."""
    megabytes: float
    """Peak of the tensors allocated, above the amount before."""


def losses_of(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def measure(model: nn.Module, x: Tensor, y: Tensor, *, repeats: int) -> tuple[list[Row], list[str]]:
    """Return the table of one model, and the methods missing from it, with reasons."""
    scale = torch.full((len(x),), 1 / len(x))

    def train(*, captured: bool = False) -> None:
        # Gradients accumulate in existing buffers: new ones in each step would make the step look slower.
        with capture_norms(model) if captured else nullcontext() as capture:
            torch.dot(losses_of(model(x), y), scale).backward()
        if capture is not None:
            assert capture.norms(scale=scale) is not None

    engines = {method: NormEngine(model, losses_of, method=method) for method in METHODS}
    peers, left_out = usable(copy.deepcopy(model), x, y, engines["exact"](x, y)[0])
    work: dict[str, Callable[[], object]] = {
        "training step": train,
        "training step with norms": lambda: train(captured=True),
        **{method: (lambda engine=engine: engine(x, y)) for method, engine in engines.items()},
        **peers,
    }
    if isinstance(model, nn.Sequential) and all(isinstance(part, (nn.Linear, nn.ReLU)) for part in model):
        step, norms = bare_products([part for part in model if isinstance(part, nn.Linear)], len(x))
        work |= {"bare products of a step": step, "bare products of norms": norms}
    for run in work.values():  # audits, buffers, caches
        run()
    megabytes = {name: peak_megabytes(run) for name, run in work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    faults: dict[str, list[int]] = {name: [] for name in work}
    order, shuffler = list(work), random.Random(0)
    for _ in range(repeats):
        shuffler.shuffle(order)  # a method finds the caches of the one before: a fixed order would favour some
        for name in order:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.process_time()
            work[name]()
            seconds[name].append(time.process_time() - start)
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        Row(name, 1e3 * median, medians["training step"] / median, statistics.median(faults[name]), megabytes[name])
        for name, median in medians.items()
    ]
    return rows, left_out


def bare_products(layers: list[nn.Linear], size: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the matrix products that an MLP's step and its norms cannot avoid, into existing buffers.

    Their quotient bounds the ratio: activations, norms and Python cost nothing here.
    """
    weights = [layer.weight.detach() for layer in layers]
    gradients = [torch.zeros_like(weight) for weight in weights]
    forward = [torch.randn(size, weight.shape[1]) for weight in weights] + [torch.empty(size, len(weights[-1]))]
    backward = [torch.randn_like(values) for values in forward]

    def passes(*, train: bool) -> None:
        for k, weight in enumerate(weights):
            torch.mm(forward[k], weight.T, out=forward[k + 1])
            forward[k + 1].mul_(1e-3)
        for k in reversed(range(len(weights))):
            if train:
                gradients[k].addmm_(backward[k + 1].T, forward[k])
            if k:
                torch.mm(backward[k + 1], weights[k], out=backward[k])
                backward[k].mul_(1e-3)

    return lambda: passes(train=True), lambda: passes(train=False)


def peak_megabytes(run: Callable[[], object]) -> float:
    """Return the peak of torch's allocations during one run: resident memory would depend on earlier runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    recorder = profiled.profiler
    assert recorder is not None
    events = [e for e in recorder.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 2**20


def report(workload: Workload, rows: list[Row], left_out: list[str]) -> None:
    print(f"\n### {workload.title}\n")
    print("| | ms | ratio | page faults | peak MB |\n|---|---:|---:|---:|---:|")
    for row in rows:
        numbers = f"{row.milliseconds:.2f} | {row.ratio:.2f} | {row.faults:.0f} | {row.megabytes:.0f}"
        print(f"| {row.name} | {numbers} |")
    if left_out:
        print("\nLeft out: " + "; ".join(left_out) + ".")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="run for seconds, not minutes; the figures mean nothing")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=list(workloads(tiny=True)), choices=list(workloads(tiny=True)))
    parser.add_argument("--zoo", nargs="*", metavar="NAME", help="architectures that people use, all or some of them")
    parser.add_argument("--json", type=Path, help="a file that the tables are put into")
    parser.add_argument("--malloc", choices=["keep", "default"], default="keep", help="whether freed memory is kept")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tables = {}
    try:
        if options.zoo is not None:
            repeats = 2 if options.tiny else options.repeats
            norms_zoo.main(tiny=options.tiny, repeats=repeats, only=options.zoo, results=options.json)
            return {}
        for name in options.only:
            torch.manual_seed(0)
            workload = workloads(tiny=options.tiny)[name]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the peers' hooks warn once per step
                table: Any = measure(
                    workload.model(), *workload.batch(), repeats=2 if options.tiny else options.repeats
                )
            report(workload, *table)
            tables[name] = table[0]
            if options.json is not None:
                saved = json.loads(options.json.read_text()) if options.json.exists() else {}
                saved[workload.title] = [asdict(row) for row in table[0]]
                options.json.write_text(json.dumps(saved, indent=1) + "\n")
    finally:
        torch.set_num_threads(threads)
    return tables


if __name__ == "__main__":
    if "default" not in sys.argv and any(os.environ.get(key) != value for key, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    main()
