"""A training run in virtual time: one process acts as learner and scorers, for ``benchmarks/staleness.py``.

The experiment: an MLP 784-512-512-512-10 on Fashion-MNIST, minibatches of 64 per learner, plain SGD at a rate that is
constant or falls to 0 along a cosine, scoring chunks of 512. The learners make one update together per unit of time;
the scorers score ``speed`` examples per example that one learner learns (0: weights come from the learners' own
minibatches alone), each chunk with the latest version when its scoring begins, and the norms arrive when it ends.
Sampler, gate, monitor, schedule and clipping are the library's own.

Scores are computed in bfloat16 (a score of any precision keeps the gradient unbiased), training and every
reported figure in float32. Letters: B examples, D features.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from explicit_mlp import Mlp
from torch import Tensor

from dask_isgd.config import Learning, Sampling
from dask_isgd.learner.clipping import Clipping
from dask_isgd.learner.gain_monitor import GainMonitor
from dask_isgd.learner.presampling import choose
from dask_isgd.learner.step import Learned, Step
from dask_isgd.pipelines import PIPELINES
from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.sampling import Draw, Gate, ImportanceSampler, next_chunks
from dask_isgd.sampling.schedule import PROBE_SHARE
from dask_isgd.sampling.variance import square_of_mean

FOLDER = Path("/usr/share/datasets/fashion-mnist")
BATCH, CHUNK = 64, 512
PUBLISH_EVERY, REPORT_EVERY = 32, 20
EVALUATE_EVERY, EVALUATED = 100, 4096
SPIKE, SPIKES_AFTER = 1.5, 500


@dataclass(frozen=True)
class Policy:
    """One of the policies that are compared: how to draw and how to clip."""

    sampling: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the library's defaults."""
    clip: float | None = field(default_factory=lambda: Learning(steps=1).clip_mean_factor)
    """``Learning.clip_mean_factor``."""
    tau: float | None = None
    """Average each example's squared norms over about so many steps of its age, counted, not by ``ema_decay``."""
    presample: int = 1
    """Draw so many minibatches, and choose one of them by bounds from a forward pass, unless the step is reported."""
    rate_gain: bool = False
    """Multiply the rate by ``Variance.rate_gain``."""
    pass_from: int | None = None
    """Score each chunk once, from this update on; None: score all the time."""


@dataclass(frozen=True)
class Images:
    x: Tensor
    """(N, D) float32, standardised: images with one mean and deviation, other data number by number."""
    y: Tensor
    """(N,) int64."""
    test_x: Tensor
    test_y: Tensor


def images(n: int | None = None) -> Images:
    """Return Fashion-MNIST, or its first ``n`` training examples."""

    def part(name: str, n: int | None) -> tuple[Tensor, Tensor]:
        x = read_idx(FOLDER / f"{name}-images-idx3-ubyte.gz")[:n]
        y = read_idx(FOLDER / f"{name}-labels-idx1-ubyte.gz")[:n]
        flat = torch.from_numpy(x.reshape(len(x), -1).astype(np.float32))
        return (flat / 255.0 - 0.2860) / 0.3530, torch.from_numpy(y.astype(np.int64))

    return Images(*part("train", n), *part("t10k", n))


def numbers(pipeline: str, url: str) -> Images:
    """Return the data of a pipeline of numbers and classes, which are written to ``url`` if they are not there."""
    group = zarr.open_group(PIPELINES[pipeline].prepare(url), mode="r")
    parts = []
    for name in ("train", "test"):
        arrays = [np.asarray(array) for _, array in sorted(group[name].arrays())]
        (x,), (y,) = ([a for a in arrays if a.ndim == d] for d in (2, 1))
        parts.append((torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))))
    mean, deviation = parts[0][0].mean(0), parts[0][0].std(0)
    return Images(*(tensor for x, y in parts for tensor in ((x - mean) / deviation, y)))


class Simulation:
    """One run; ``record`` holds its measurements."""

    def __init__(
        self,
        data: Images,
        policy: Policy,
        *,
        rate: float,
        seed: int,
        speed: float,
        width: int = 512,
        learners: int = 1,
        decay: bool = False,
    ) -> None:
        self.data, self.policy, self.rate, self.speed = data, policy, rate, speed
        self.batch, self.decay = BATCH * learners, decay
        self.n = len(data.x)
        self.sampling = Sampling(**policy.sampling)
        self.rng = np.random.default_rng(seed)
        self.model = Mlp((data.x.shape[1], width, width, width, 10), seed)
        self.sampler = ImportanceSampler(self.n, CHUNK, self.sampling)
        self.gate, self.clipping = Gate(self.sampling), Clipping(None, policy.clip)
        self.clipped = 0
        self.monitor = GainMonitor(self.sampler, self.gate, reproducible=False)
        self.x = data.x.bfloat16()
        # The same examples in all runs, so that they can be compared.
        self.evaluated = np.sort(np.random.default_rng(0).permutation(self.n)[:EVALUATED])
        self.evaluated_x = self.x[self.evaluated]
        self.versions = np.full(self.sampler.n_chunks, np.nan)
        self.averages = None if policy.tau is None else Averages(self.n, policy.tau)
        self.scoring: tuple[int, int, Mlp] | None = None
        self.ready = float(policy.pass_from or 0)
        self.record: dict[str, list[float]] = {
            key: []
            for key in ("loss", "stale_over_ideal", "smoothing_factor", "staleness_factor", "gain", "ideal_gain")
        }
        self.record["monitor_gain"] = []
        self.opened: int | None = None

    def run(self, updates: int) -> dict[str, Any]:
        began = time.process_time()
        diverged = False
        self.published = (0, self.model.published())
        for step in range(updates):
            if step % PUBLISH_EVERY == 0:
                self.published = (step, self.model.published())
                self.sampler.refresh(step)
            if not self.sampling.uniform:
                self._score(step)
            self._learn(step, self.rate * (0.5 * (1 + math.cos(math.pi * step / updates)) if self.decay else 1.0))
            if (step + 1) % EVALUATE_EVERY == 0:
                self._evaluate()
                if not math.isfinite(self.record["loss"][-1]):
                    diverged = True
                    break
        final = math.nan if diverged else self._loss(self.data.x, self.data.y)
        wrong = (self.model.forward(self.data.test_x)[-1].argmax(1) != self.data.test_y).float().mean()
        return {
            "final_loss": final,
            "test_error": float(wrong),
            "diverged": diverged,
            "spikes": spikes(self.record["loss"]),
            "clipped": self.clipped / updates,
            "opened": self.opened,
            "seconds": round(time.process_time() - began, 1),
            **{key: [float(f"{v:.5g}") for v in values] for key, values in self.record.items()},
        }

    def _score(self, now: int) -> None:
        """Score until ``now``, in units of updates."""
        while self.speed and self.ready <= now:
            if self.scoring is not None:
                self._scored(*self.scoring)
            if self.policy.pass_from is not None and np.isfinite(self.versions).all():
                self.speed = 0.0
                return
            self.scoring = (next_chunks(self.versions, [], 1)[0], *self.published)
            self.ready += CHUNK / (self.speed * BATCH) / (PROBE_SHARE if self.gate.probing else 1.0)

    def _scored(self, chunk: int, version: int, model: Mlp) -> None:
        rows = slice(chunk * CHUNK, min(self.n, (chunk + 1) * CHUNK))
        found, _ = model.backward(model.forward(self.x[rows]), self.data.y[rows])
        norms = found.numpy()
        if self.averages is not None:
            norms = self.averages.take(np.arange(rows.start, rows.stop), norms, version)
        self.sampler.update(chunk, norms, version)
        self.versions[chunk] = version

    def _learn(self, step: int, rate: float) -> None:
        open_, measure = self.gate.open, (step + 1) % REPORT_EVERY == 0
        presample = self.policy.presample if open_ and not measure else 1
        model = self.model.published()
        size = self.batch * presample
        # ||μ||² is estimated without bias from independent draws only
        scheme = "independent" if measure and self.policy.rate_gain else None
        sampler = self.sampler
        draw = sampler.draw(size, self.rng, scheme) if open_ else sampler.draw_uniform(size, self.rng, scheme)
        if presample > 1:
            draw = self._chosen(draw, model)
        if open_ and self.opened is None:
            self.opened = step
        indices = torch.from_numpy(draw.indices)
        x, y = self.x[indices], self.data.y[indices]
        scale = torch.from_numpy((draw.coefficients / self.batch).astype(np.float32))
        norms, gradients = model.backward(model.forward(x), y, scale)
        found = norms.numpy().astype(np.float64)
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        )
        if np.isfinite(found).all():
            if presample == 1:  # others are no independent draws of known probability
                # Second moments and gains are the same without ||μ||².
                square = square_of_mean(float(norm), draw.coefficients, found) if scheme is not None else 0.0
                self.monitor.observe([Learned(step, draw, Step(math.nan, found, square, math.nan, False), measure)])
            if self.sampling.feedback and not self.sampling.uniform:
                fed = found if self.averages is None else self.averages.take(draw.indices, found, step)
                self.sampler.feedback(draw.indices, fed, step)
        clipped = self.clipping(norm, float(draw.coefficients.max()))
        factor = 1.0 if clipped is None else 1.0 / float(clipped.divisor)
        self.clipped += factor < 1
        if self.policy.rate_gain and open_:
            rate *= self.monitor.variance.rate_gain(self.batch)
        for parameter, gradient in zip(self.model.parameters, gradients, strict=True):
            parameter.add_(gradient, alpha=-rate * factor)

    def _chosen(self, pool: Draw, model: Mlp) -> Draw:
        """Return a minibatch drawn from ``pool`` by the norms of the gradients of its logits."""
        indices = torch.from_numpy(pool.indices)
        logits = model.forward(self.x[indices])[-1].softmax(1)
        logits[torch.arange(len(indices)), self.data.y[indices]] -= 1.0
        bounds = torch.linalg.vector_norm(logits, dim=1).double().numpy()
        return choose(pool, bounds, self.batch, self.sampling.largest_coefficient, self.rng)[1]

    def _evaluate(self) -> None:
        losses = self.record["loss"]
        x, y = self.evaluated_x, self.data.y[self.evaluated]
        model = self.model.published()
        layers = model.forward(x)
        losses.append(float(torch.nn.functional.cross_entropy(layers[-1], y)))
        if len(losses) % 2 or not math.isfinite(losses[-1]):
            return
        g = model.backward(layers, y)[0].double().numpy()
        s = np.ones(len(g)) if self.sampling.uniform else self.sampler.probabilities(self.evaluated)
        added = (1.0 / self.sampler.stats(0)["largest_coefficient"]) if not self.sampling.uniform else 1.0
        fresh = g / g.mean() * (1 - added) + added  # an equally smoothed proposal from fresh norms
        ideal, uniform = g.mean() ** 2, (g * g).mean()
        stale, smoothed = s.mean() * (g * g / s).mean(), fresh.mean() * (g * g / fresh).mean()
        for key, value in {
            "stale_over_ideal": stale / ideal,
            "smoothing_factor": smoothed / ideal,
            "staleness_factor": stale / smoothed,
            "gain": uniform / stale,
            "ideal_gain": uniform / ideal,
            "monitor_gain": self.monitor.row(0)["gain"],
        }.items():
            self.record[key].append(float(value))

    def _loss(self, x: Tensor, y: Tensor) -> float:
        parts = zip(x.split(5000), y.split(5000), strict=True)
        return math.fsum(float(self.model.losses(*part).double().sum()) for part in parts) / len(y)


class Averages:
    """Averages of squared norms in which a former one weighs exp(-Δt/τ), Δt steps later."""

    def __init__(self, n: int, tau: float) -> None:
        self.squares, self.counts, self.steps, self.tau = np.zeros(n), np.zeros(n), np.zeros(n), tau

    def take(self, indices: np.ndarray, norms: np.ndarray, step: int) -> np.ndarray:
        """Add norms (B,) of ``step``, and return the roots of the averages of these examples."""
        kept = self.counts[indices] * np.exp(-np.maximum(0.0, step - self.steps[indices]) / self.tau)
        squares = (kept * self.squares[indices] + np.square(norms, dtype=np.float64)) / (kept + 1.0)
        self.squares[indices], self.counts[indices] = squares, kept + 1.0
        self.steps[indices] = np.maximum(step, self.steps[indices])
        return np.sqrt(squares)


def spikes(losses: list[float]) -> int:
    """Return how many evaluations, after the first 500 updates, exceed 1.5 × the running minimum."""
    low = np.minimum.accumulate(losses)
    late = np.arange(1, len(losses) + 1) * EVALUATE_EVERY > SPIKES_AFTER
    return int((late & ~(np.asarray(losses) <= SPIKE * low)).sum())
