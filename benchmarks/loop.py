"""What ImportanceBatchSampler costs in a plain PyTorch loop, beside torch's own samplers and a small model's step.

Samplers are timed in one process without data: what a loop asks of them per minibatch. ``importance`` draws by scores
and is fed the scores of every minibatch; ``WeightedRandomSampler`` draws by fixed weights, with replacement, a pass at
a time, as it has to; above 2^24 examples it refuses. The step is that of the MLP 784-512x3-10, minibatch 64, one torch
thread. Each is timed in turn, several times, and the median is reported.

    python benchmarks/loop.py --examples 10_000_000
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

import dask_isgd as isgd

BATCH = 64


def importance(n: int) -> Iterator[None]:
    """Draw by scores, and report the scores of each minibatch."""
    sampler = isgd.ImportanceBatchSampler(n, BATCH, sampling=isgd.Sampling(gate="open"))
    scores = np.random.default_rng(0).exponential(size=n).astype(np.float32)
    sampler.load_scores(scores)
    of_minibatches = itertools.cycle(torch.from_numpy(scores[: 1024 * BATCH]).split(BATCH))  # a model's pass makes them
    for batch in sampler:
        index = np.array([pair[0] for pair in batch])
        sampler.update(index, next(of_minibatches))
        yield None


def uniform(n: int) -> Iterator[None]:
    """torch's shuffle: a permutation of all, then minibatches of it."""
    for _ in BatchSampler(RandomSampler(range(n)), BATCH, drop_last=True):
        yield None


def weighted(n: int) -> Iterator[None]:
    """torch's weighted sampler: multinomial draws of a whole pass at once."""
    weights = torch.from_numpy(np.random.default_rng(0).exponential(size=n))
    for _ in BatchSampler(WeightedRandomSampler(weights, n), BATCH, drop_last=True):
        yield None


def step() -> Iterator[None]:
    """One step of the small MLP."""
    sizes = [784, 512, 512, 512, 10]
    layers = [m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))
    while True:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield None


def first_seconds(make: Callable[[int], Iterator[None]], n: int) -> tuple[Iterator[None], float]:
    """Return an iterator whose first minibatch is there, and the seconds that it took."""
    began = time.perf_counter()
    running = make(n)
    next(running)
    return running, time.perf_counter() - began


def measure(n: int, rounds: int, minibatches: int) -> dict[str, Any]:
    """Return microseconds per minibatch, seconds to the first one, and the share of a step."""
    torch.set_num_threads(1)
    samplers = {"importance": importance, "RandomSampler": uniform}
    if n < 2**24:
        samplers["WeightedRandomSampler"] = weighted
    running, first = {}, {}
    for name, make in samplers.items():
        running[name], first[name] = first_seconds(make, n)
    running["step"] = step()
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, each in running.items():
            began = time.perf_counter()
            for _ in itertools.islice(each, minibatches):
                pass
            times[name].append((time.perf_counter() - began) / minibatches * 1e6)
    cost = {name: statistics.median(values) for name, values in times.items()}
    passes = -(-n // BATCH)
    # a pass of torch's samplers begins with the draw of all of it; to follow scores, it has to begin again and again
    whole = {name: cost[name] + first[name] / passes * 1e6 for name in samplers}
    return {
        "examples": n,
        "us_per_minibatch": cost,
        "seconds_to_first": first,
        "us_with_start_over_a_pass": whole,
        "us_with_start_every_1000_minibatches": {name: cost[name] + first[name] * 1e3 for name in samplers},
        "share_of_step": cost["importance"] / cost["step"],
        "share_of_step_beyond_random": (cost["importance"] - cost["RandomSampler"]) / cost["step"],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minibatches", type=int, default=160, help="per round")
    options = parser.parse_args(arguments)
    found = measure(options.examples, options.rounds, options.minibatches)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
