"""The cost of a draw, an update and feedback, how little a draw depends on N, and the cost of alternatives.

    python benchmarks/sampling.py           # two minutes, about 1.5 GB
    python benchmarks/sampling.py --tiny    # what the tests run

Weights change between any two draws in every line: 128 of them by feedback for the sampler, at least one for
the alternatives, which start from scratch in any case. Prints one JSON line: medians in microseconds, and three
ratios with aims: ``scaling`` of draws of 128 from the smallest N to the largest (aim: at most 3), ``speedup`` over
``numpy.random.Generator.choice(p=)`` and ``torch.multinomial`` (aim: at least 20), and ``cpprb``'s time
over the sampler's for a draw and a scattered update of 4,096 weights (aim: above 1; null if cpprb is not installed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dask_isgd.config import Sampling
from dask_isgd.sampling import ImportanceSampler

BATCH = 128
CHUNK = 16_384
SCATTERED = 4096


def median(call: Callable[[], object], times: int, before: Callable[[], object] = lambda: None) -> float:
    """Return the median microseconds of a call; ``before`` runs before each call and is not counted."""
    seconds = []
    for _ in range(times + 1):
        before()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(seconds[1:]), 1)


def filled(n: int, rng: np.random.Generator) -> ImportanceSampler:
    sampler = ImportanceSampler(n, CHUNK, Sampling())
    for chunk in range(sampler.n_chunks):
        sampler.update(chunk, rng.standard_exponential(min(CHUNK, n - chunk * CHUNK), np.float32), 0)
    sampler.refresh(0)
    return sampler


def measure(n: int, times: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    sampler = filled(n, rng)
    norms = rng.exponential(size=BATCH)
    fresh = rng.standard_exponential(min(CHUNK, n), np.float32)
    drawn = [rng.integers(n, size=BATCH)]

    def draw() -> None:
        drawn[0] = sampler.draw(BATCH, rng).indices

    def feedback() -> None:
        sampler.feedback(drawn[0], norms, 1)

    return {
        "n": n,
        "draw": median(draw, times, before=feedback),
        "feedback": median(feedback, times, before=draw),
        "update": median(lambda: sampler.update(0, fresh, 0), times),
        "refresh": median(lambda: (sampler.refresh(1), sampler.draw(1, rng)), times),
        "stats": median(lambda: sampler.stats(1), max(3, times // 10), before=lambda: [(draw(), feedback())] * 20),
        "bytes_per_example": round(sampler.nbytes / n, 3),
    }


def others(n: int, times: int) -> dict[str, float]:
    """Measure draws of 128 by functions that read all N weights each time."""
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=n)
    tensor = torch.from_numpy(weights)

    def change() -> None:
        weights[rng.integers(n)] *= 1.1

    return {
        "Generator.choice": median(lambda: rng.choice(n, size=BATCH, p=weights / weights.sum()), times, before=change),
        "torch.multinomial": median(lambda: torch.multinomial(tensor, BATCH, replacement=True), times, before=change),
    }


def against_cpprb(n: int, times: int) -> dict[str, float] | None:
    """Measure a draw of 128 and a scattered update of 4,096 weights: the sampler's and cpprb's prioritized buffer's."""
    try:
        import cpprb
    except ImportError:
        return None
    rng = np.random.default_rng(0)
    sampler = filled(n, rng)
    buffer = cpprb.PrioritizedReplayBuffer(n, {"index": {"dtype": np.int32}}, alpha=1.0)
    buffer.add(index=np.arange(n, dtype=np.int32), priorities=rng.exponential(size=n))
    state: dict[str, Any] = {}

    def scatter() -> None:
        state["where"] = rng.integers(n, size=SCATTERED)
        state["norms"] = rng.exponential(size=SCATTERED)

    def ours() -> None:
        sampler.draw(BATCH, rng)
        sampler.feedback(state["where"], state["norms"], 1)

    def theirs() -> None:
        buffer.sample(BATCH, beta=1.0)
        buffer.update_priorities(state["where"], state["norms"])

    found = {"ours": median(ours, times, before=scatter), "cpprb": median(theirs, times, before=scatter)}
    return {"n": n, **found, "ratio": round(found["cpprb"] / found["ours"], 2)}


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use small sizes: a test that it runs")
    tiny = parser.parse_args(argv).tiny
    torch.set_num_threads(1)
    sizes, times = ([1_000, 20_000, 50_000], 3) if tiny else ([10**5, 10**6, 10**7, 10**8], 300)
    rows = [measure(n, times) for n in sizes]
    middle = rows[-2]
    slow = others(int(middle["n"]), 3 if tiny else 10)
    result = {
        "batch": BATCH,
        "chunk": CHUNK,
        "sizes": rows,
        "others": slow,
        "scaling": round(rows[-1]["draw"] / rows[0]["draw"], 2),
        "speedup": {name: round(time / middle["draw"], 1) for name, time in slow.items()},
        "cpprb": against_cpprb(sizes[1], times),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
