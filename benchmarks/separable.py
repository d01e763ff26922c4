"""The final loss where all examples can be fitted, with uniform draws and weighted ones, clipped by default and not.

    python benchmarks/separable.py            # five minutes on one core
    python benchmarks/separable.py --tiny     # what the tests run

There the noise of the gradient vanishes with the loss, so a smaller variance wins nothing in the end; what this shows
is whether weights and clipping cost progress. Real ``Trainer``, ``BatchSampler`` and gate; a chunk of 64 is scored
every other step, every twentieth while the gate is closed. Prints one line of JSON per problem: the mean final loss
over the seeds, and the share of steps that were clipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import dask_isgd as isgd
from dask_isgd.core.loss import cross_entropy
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.trainer import Trainer
from dask_isgd.pipelines import models
from dask_isgd.pipelines.datasets import digits as digits_dataset

CHUNK, REPORT_EVERY = 64, 20

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uniform": ({"uniform": True}, {}),
    "weighted, unclipped": ({}, {"clip_mean_factor": None}),
    "weighted, default": ({}, {}),
}
"""Differences from the default settings of ``Sampling`` and ``Learning``."""


class Problem(NamedTuple):
    x: Tensor
    """(N, ...) float32."""
    y: Tensor
    """(N,) int64."""
    model: nn.Module
    rate: float
    batch: int


def digits() -> Problem:
    """Four fifths of scikit-learn's digits, standardised, and the model of the pipeline."""
    images, labels = digits_dataset.load()
    chosen = np.random.default_rng(42).permutation(len(labels))[:1438]
    x = ((images - images.mean()) / images.std()).astype(np.float32)[chosen]
    y = labels[chosen].astype(np.int64)
    return Problem(torch.from_numpy(x), torch.from_numpy(y), models.digits(), 0.1, 64)


def two_classes() -> Problem:
    """2,000 points in 20 dimensions with a plane between the classes, and a linear model."""
    rng = np.random.default_rng(0)
    y, x, normal = rng.integers(0, 2, 2000), rng.normal(size=(2000, 20)), rng.normal(size=20)
    normal /= np.linalg.norm(normal)
    x += ((2 * y - 1) * (0.2 + np.abs(rng.normal(size=2000))) - x @ normal)[:, None] * normal
    return Problem(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), nn.Linear(20, 2), 0.05, 32)


PROBLEMS = {"digits": digits, "two classes": two_classes}


def train(name: str, arm: str, seed: int, steps: int) -> tuple[float, float]:
    """Return the final loss on all examples, and the share of steps that were clipped."""
    torch.manual_seed(seed)
    problem = PROBLEMS[name]()
    x, y, model = problem.x, problem.y, problem.model
    sampling, learning = isgd.Sampling(**ARMS[arm][0]), ARMS[arm][1]
    settings = {"batch_size": problem.batch, "learning_rate": problem.rate, "device": "cpu", **learning}
    weighted = not sampling.uniform
    trainer = Trainer(model, cross_entropy, isgd.Learning(steps=steps, **settings), weighted=weighted)
    sampler = BatchSampler(len(x), CHUNK, problem.batch, sampling, seed=seed, report_every=REPORT_EVERY)
    clipped = scored = 0
    for step in range(steps):
        if weighted and step % (20 if sampler.idle else 2) == 0:
            chunk, scored = scored % sampler.sampler.n_chunks, scored + 1
            rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            sampler.update(chunk, isgd.gradient_norms(model, cross_entropy, x[rows], y[rows]).numpy(), step)
            model.train()
        draw, measure = sampler.draw(step), (step + 1) % REPORT_EVERY == 0
        drawn = torch.from_numpy(draw.indices)
        result = trainer.step(step, (x[drawn],), y[drawn], draw.coefficients, norms=weighted, measure=measure)
        sampler.learned(step, draw, result, measure=measure)
        clipped += result.clipped
    with torch.no_grad():
        return float(cross_entropy(model(x), y).mean()), clipped / steps


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use small sizes: a test that it runs")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps, seeds = (40, 1) if arguments.tiny else (arguments.steps, arguments.seeds)
    results: dict[str, Any] = {}
    for name in PROBLEMS:
        results[name] = {}
        for arm in ARMS:
            runs = [train(name, arm, seed, steps) for seed in range(seeds)]
            means = (statistics.fmean(values) for values in zip(*runs, strict=True))
            results[name][arm] = dict(zip(("loss", "clipped"), means, strict=True))
        print(json.dumps({name: results[name]}), flush=True)
    return results


if __name__ == "__main__":
    main()
