"""What an optimizer makes of importance sampling: the size of its steps and their drift, uniform against ideal weights.

    python benchmarks/optimizers.py             # some 20 s of CPU, the same figures on every machine
    python benchmarks/optimizers.py --tiny      # what the tests run

Least squares, 20,000 examples with 8 features and an intercept, 1 % of the targets far off, minibatches of 64. The
parameters stay a little beside the optimum (the learning rate is 1e-12), so that the gradient has the same distribution
in all steps: much noise and a weak mean. Proposals are exact norms without smoothing. Two figures for each optimizer,
importance over uniform: root mean square of the steps, and their mean along the negative mean gradient (drift).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dask_isgd.config import Learning
from dask_isgd.learner.clipping import Clipping

BATCH, RATE, WARM_UP = 64, 1e-12, 0.3

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=RATE),
    "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=RATE),
    "Adam": lambda p: torch.optim.Adam(p, lr=RATE),
}


class Problem(NamedTuple):
    gradients: NDArray[np.float64]
    """(N, P) of every example."""
    norms: NDArray[np.float64]

    @property
    def gain(self) -> float:
        return float((self.norms**2).mean() / self.norms.mean() ** 2)


class Steps(NamedTuple):
    """In units of the learning rate."""

    rms: float
    drift: float


def problem(n: int = 20_000, features: int = 8) -> Problem:
    rng = np.random.default_rng(0)
    x = np.c_[rng.normal(size=(n, features)), np.ones(n)]
    y = x[:, :-1] @ rng.normal(size=features) + rng.normal(size=n)
    y[rng.permutation(n)[: n // 100]] += 30
    beside = np.linalg.lstsq(x, y, rcond=None)[0] + 0.015
    gradients = (x @ beside - y)[:, None] * x
    return Problem(gradients, np.linalg.norm(gradients, axis=1))


def steps(data: Problem, name: str, q: NDArray[np.float64], count: int, clipping: Clipping | None) -> Steps:
    """Take ``count`` steps with draws from ``q`` (N,), and measure those after the first third."""
    rng, n = np.random.default_rng(1), len(q)
    parameter = torch.nn.Parameter(torch.zeros(data.gradients.shape[1], dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([parameter])
    mean = data.gradients.mean(0)
    along = torch.from_numpy(-mean / np.linalg.norm(mean))
    squares, drifts, cumulated = [], [], np.cumsum(q)
    for step in range(count):
        rows = np.minimum(np.searchsorted(cumulated, rng.random(BATCH) * cumulated[-1]), n - 1)
        coefficients = 1.0 / (n * q[rows])
        parameter.grad = torch.from_numpy(coefficients @ data.gradients[rows] / BATCH)
        if clipping is not None:
            clipped = clipping(parameter.grad.norm(), coefficients.max())
            if clipped is not None:  # not in its first steps
                parameter.grad /= clipped.divisor
        before = parameter.detach().clone()
        optimizer.step()
        if step >= WARM_UP * count:
            moved = (parameter.detach() - before) / RATE
            squares.append(float(moved @ moved))
            drifts.append(float(moved @ along))
    return Steps(float(np.sqrt(np.mean(squares))), float(np.mean(drifts)))


def main(argv: list[str] | None = None) -> dict[str, Steps]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="take few steps: a test that it runs")
    count = 3000 if parser.parse_args(argv).tiny else 30_000
    torch.set_num_threads(1)
    data = problem()
    uniform, ideal = np.full(len(data.norms), 1 / len(data.norms)), data.norms / data.norms.sum()
    print(
        f"gain {data.gain:.2f}, its root {data.gain**0.5:.2f}\n\n| optimizer | size of steps | drift |\n|---|---|---|"
    )
    found = {}
    for name in OPTIMIZERS:
        for clip in (None, Learning(steps=1).clip_mean_factor) if name == "SGD" else (None,):
            one = steps(data, name, uniform, count, None)
            other = steps(data, name, ideal, count, None if clip is None else Clipping(None, clip))
            row = name if clip is None else f"{name}, clipped by default"
            found[row] = Steps(other.rms / one.rms, other.drift / one.drift)
            print(f"| {row} | {found[row].rms:.2f} | {found[row].drift:.2f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
