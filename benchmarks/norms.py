"""Exact norms against a training step: throughput of the engine over that of forward and backward.

A training step is forward and backward of the mean loss with kept gradient buffers; zeroing them and the
optimizer are left out.
One thread, medians, the two interleaved. Run from the repository: ``python -m benchmarks.norms [--tiny]``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_isgd.norms import NormEngine, capture_norms

METHODS = ("exact", "bound", "loss")


@dataclass(frozen=True)
class Row:
    """One line of the table; ``ratio`` is the training step's seconds over this line's."""

    name: str
    milliseconds: float
    ratio: float


def mlp(inputs: int, width: int, layers: int, classes: int) -> nn.Module:
    """The paper's network: ``layers`` hidden layers of ``width``, ReLU."""
    sizes = [inputs, *[width] * layers]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def losses_of(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def measure(model: nn.Module, inputs: Tensor, targets: Tensor, *, repeats: int) -> list[Row]:
    """Median seconds of a training step, of one with its norms captured, and of each method."""
    scale = torch.full((len(inputs),), 1 / len(inputs))

    def train(*, captured: bool = False) -> None:
        # Gradients add up in the buffers they have: new ones each step would flatter what is compared.
        with capture_norms(model) if captured else nullcontext() as capture:
            torch.dot(losses_of(model(inputs), targets), scale).backward()
        if capture is not None:
            assert capture.norms(scale=scale) is not None

    engines = {method: NormEngine(model, losses_of, method=method) for method in METHODS}
    work: dict[str, Callable[[], object]] = {
        "training step": train,
        "training step with norms": lambda: train(captured=True),
        **{method: (lambda engine=engine: engine(inputs, targets)) for method, engine in engines.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for run in work.values():  # audits, buffers, caches
        run()
    order, shuffler = list(work), random.Random(0)
    for _ in range(repeats):
        shuffler.shuffle(order)  # what ran before leaves its caches: always the same order favours some
        for name in order:
            run = work[name]
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [Row(name, 1e3 * median, medians["training step"] / median) for name, median in medians.items()]


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="seconds, not minutes; the figures mean nothing")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        inputs, width, layers, size = (12, 16, 2, 8) if options.tiny else (3072, 2048, 4, 256)
        model = mlp(inputs, width, layers, 10)
        x, y = torch.randn(size, inputs), torch.randint(0, 10, (size,))
        rows = measure(model, x, y, repeats=2 if options.tiny else options.repeats)
    finally:
        torch.set_num_threads(threads)
    print(f"MLP {inputs}-{width}×{layers}-10, B={size}, one thread")
    print(f"{'':26}{'ms':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row.name:26}{row.milliseconds:10.2f}{row.ratio:8.2f}")
    return rows


if __name__ == "__main__":
    main()
