"""Plain PyTorch outside Dask: what a user would run without this library.

    python benchmarks/plain.py mlp-64 --threads 2 --seconds 10
    python benchmarks/plain.py large-mlp --work norms

The process has the system's own environment and allocator. Data are tensors in memory; the training loop visits them
in a new random order in every epoch, with SGD and Nesterov momentum. ``--work capture`` also computes the norms of each
minibatch in its backward pass. ``--work norms`` does not train: it computes the norms of all examples in order, batch
after batch, with one ``NormEngine``. Prints a line of JSON: steps (norms: examples) per second after a warm-up of a
quarter of the time, page faults per step (norms: per batch), and the kernel's share of CPU time. ``cost.py`` keeps such
processes waiting (``--serve``): they measure whenever a line ``WARM SECONDS`` arrives on standard input.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from cost_problems import LEARNING_RATE, MOMENTUM, PROBLEMS, Problem
from torch import nn

_FREED = 31 << 20
"""Bytes, less than the largest size from which glibc learns."""


def loaded(problem: Problem, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the data as tensors.

    A script that reads files has freed large buffers by then, from which glibc learns to keep freed memory; random
    numbers leave none, so one is allocated and freed here. Without it a small model's step has 700 page faults, not 2.
    """
    x, y = map(torch.from_numpy, problem.arrays(rows))
    torch.zeros(_FREED, dtype=torch.uint8)
    return x, y


def training(problem: Problem, rows: int, *, capture: bool) -> Iterator[int]:
    """Take one step per ``next``."""
    x, y = loaded(problem, rows)
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True)
    while True:
        for chosen in torch.randperm(len(x)).split(problem.batch_size):
            optimizer.zero_grad()
            if capture:
                captured_step(model, x[chosen], y[chosen])
            else:
                nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            yield 1


def captured_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Compute gradients and the examples' norms in one backward pass."""
    from dask_isgd.norms import capture_norms

    scale = torch.full((len(x),), 1 / len(x))
    with capture_norms(model) as captured:
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        torch.dot(losses, scale).backward()
        if captured.norms(scale=scale) is None:
            raise RuntimeError(f"{type(model).__name__}: its backward pass does not yield norms")


def norms(problem: Problem, rows: int) -> Iterator[int]:
    """Compute the norms of one batch per ``next``, and yield how many."""
    from dask_isgd.norms import NormEngine

    x, y = loaded(problem, rows)
    loss = functools.partial(nn.functional.cross_entropy, reduction="none")
    engine = NormEngine(problem.model(), loss)
    while True:
        for inputs, targets in zip(x.split(problem.scoring_batch), y.split(problem.scoring_batch), strict=True):
            engine(inputs, targets)[0].numpy()
            yield len(targets)


def timed(work: Iterator[int], warm: float, seconds: float) -> dict[str, float]:
    """Work for ``warm`` seconds, then count what is done in about ``seconds``."""
    until = time.perf_counter() + warm
    while time.perf_counter() < until:
        next(work)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    done = turns = 0
    while (now := time.perf_counter()) < began + seconds or turns < 2:
        done += next(work)
        turns += 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return {
        "per_second": done / (now - began),
        "per_cpu_second": done / (system + user),
        "page_faults": (after.ru_minflt - before.ru_minflt) / turns,
        "system_share": system / (system + user),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--work", choices=("training", "capture", "norms"), default="training")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rows", type=int, help="examples in memory")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--serve", action="store_true", help="measure whenever a line of standard input asks for it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    problem = PROBLEMS[options.problem]
    rows = options.rows or problem.rows
    if options.work == "norms":
        work = norms(problem, rows)
    else:
        work = training(problem, rows, capture=options.work == "capture")
    if not options.serve:
        result = {"threads": options.threads, **timed(work, options.seconds / 4, options.seconds)}
        print(json.dumps(result))
        return result
    next(work)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(work, *map(float, line.split()))), flush=True)
    return None


if __name__ == "__main__":
    main()
