"""What the checks of later batches cost: CPU seconds per batch, per check, and the share of the time that they take.

To run it: ``python benchmarks/norms_checks.py [--tiny]``. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from norms import losses_of
from norms_models import workloads

from dask_isgd.norms import NormEngine
from dask_isgd.norms.later_batches import nodes_created


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median CPU seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(name: str, *, tiny: bool) -> float:
    """Print one line, and return the share of a batch's time that checks take."""
    workload = workloads(tiny=tiny)[name]
    model, (x, y) = workload.model(), workload.batch()
    engine = NormEngine(model, losses_of)
    for _ in range(3):  # the audit, and the check of the second batch
        norms, _ = engine(x, y)
    assert engine.plan is not None
    got = float(norms[0]) ** 2
    batch = seconds(lambda: engine(x, y), 3 if tiny else 9)
    check = seconds(lambda: engine._mismatch(0, x, y, got, []), 3 if tiny else 9)
    mark = 2 * seconds(nodes_created, 99)
    period = engine._schedule.period
    share = (check / period + mark) / batch
    print(
        f"{workload.title}: batch {1e3 * batch:.2f} ms, check {1e3 * check:.2f} ms every {period} batches: {share:.2%}",
        flush=True,
    )
    return share


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="run for seconds; the figures mean nothing")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: measure(name, tiny=options.tiny) for name in ("small-mlp", "resnet", "transformer")}
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
