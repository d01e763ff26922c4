"""What a draw, an update and feedback cost, and that a draw hardly depends on N.

    python benchmarks/sampling.py           # a minute, about 1 GB
    python benchmarks/sampling.py --tiny    # what the tests run

Prints one JSON line: medians in microseconds, and the ratios that are promised (``scaling`` of a draw of 128 from
the smallest N to the largest, aim at most 3; ``speedup`` over ``Generator.choice(p=)``, aim at least 20).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from dask_isgd.config import Sampling
from dask_isgd.sampling import ImportanceSampler

BATCH = 128
CHUNK = 16_384


def median(call: Callable[[], object], times: int) -> float:
    """Median microseconds of a call."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(seconds), 1)


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

    def step() -> None:
        sampler.feedback(sampler.draw(BATCH, rng).indices, norms, 1)

    return {
        "n": n,
        "draw": median(lambda: sampler.draw(BATCH, rng), times),
        "draw_and_feedback": median(step, times),
        "update": median(lambda: sampler.update(0, fresh, 0), times),
        "refresh": median(lambda: (sampler.refresh(1), sampler.draw(1, rng)), times),
        "bytes_an_example": round(sampler.nbytes / n, 3),
    }


def choice(n: int, times: int) -> float:
    rng = np.random.default_rng(0)
    p = rng.exponential(size=n)
    p /= p.sum()
    return median(lambda: rng.choice(n, size=BATCH, p=p), times)


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    tiny = parser.parse_args(argv).tiny
    sizes, times = ([1_000, 20_000, 50_000], 3) if tiny else ([10**5, 10**7, 10**8], 300)
    rows = [measure(n, times) for n in sizes]
    chosen = choice(sizes[1], 3 if tiny else 10)
    result = {
        "batch": BATCH,
        "chunk": CHUNK,
        "sizes": rows,
        "choice": chosen,
        "scaling": round(rows[-1]["draw"] / rows[0]["draw"], 2),
        "speedup": round(chosen / rows[1]["draw"], 1),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
