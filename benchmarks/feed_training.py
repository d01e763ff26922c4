"""What a feed does to training: its final loss and its curves, against direct draws from memory.

    python benchmarks/feed_training.py            # a few minutes on one core
    python benchmarks/feed_training.py --tiny     # what the tests run

2,560 examples of ten classes lie sorted by class in 40 zstd chunks, and the feed gets the memory of 16 of them. A
small MLP is trained with the library's own sampler and trainer, once from memory and once through
the feed, for the same steps. "Reported" is what a run's history shows; "exact" is computed from all examples at
the same parameters. The last line compares the variance of the mean gradient of 50 minibatches, at fixed parameters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dask_isgd.config import Learning, Sampling
from dask_isgd.core.batch import Prepare
from dask_isgd.core.loss import cross_entropy
from dask_isgd.learner.batch_sampler import BatchSampler
from dask_isgd.learner.feed import Feed, open_feed
from dask_isgd.learner.trainer import Trainer
from dask_isgd.norms import gradient_norms
from dask_isgd.sampling import Draw
from dask_isgd.sampling.variance import gradient_variance
from dask_isgd.storage import Dataset, write_dataset

CHUNKS, ROWS, CLASSES, WIDTH, BATCH, RESIDENT = 40, 64, 10, 20, 32, 16
REPORT_EVERY = 20
WINDOW = 50


@dataclass
class Outcome:
    """How a run ended, and the means of its later half, reported and exact."""

    final_loss: float
    reported_loss: float
    exact_loss: float
    reported_variance: float
    exact_variance: float
    reported_gain: float
    exact_gain: float
    largest_coefficient: float
    feed: str


def write(folder: Path) -> Dataset:
    """Write the examples, sorted by class: overlapping clusters, so that they can be fitted but not separated."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(CLASSES), CHUNKS * ROWS // CLASSES)
    x = rng.normal(size=(CLASSES, WIDTH))[label] * 0.5 + rng.normal(size=(len(label), WIDTH))
    arrays = {"x": x.astype(np.float32), "y": label}
    write_dataset(folder, "train", arrays, inputs="x", target="y", chunk_size=ROWS, classes=CLASSES, compressed=True)
    return Dataset(folder)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def settings(memory: int, steps: int, seed: int) -> Learning:
    return Learning(
        steps=steps, batch_size=BATCH, learning_rate=0.01, momentum=0.9, clip_mean_factor=None, device="cpu",
        cache_memory=memory, cache_disk=0, report_every=REPORT_EVERY, seed=seed,
    )  # fmt: skip


class Recorded(BatchSampler):
    """Keeps the probabilities that the minibatches of reporting steps were drawn with."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.q: dict[int, NDArray[np.float64]] = {}

    def draw(self, step: int, attempt: int = 0) -> Draw:
        if (step + 1) % REPORT_EVERY == 0:
            n = self.sampler.n
            self.q[step] = self.sampler.probabilities() if self.open else np.full(n, 1 / n)
        return super().draw(step, attempt)


def opened(data: Dataset, learning: Learning, sampling: Sampling) -> tuple[Recorded, Feed]:
    sampler = Recorded(len(data), 4 * ROWS, BATCH, sampling, seed=learning.seed, report_every=REPORT_EVERY)
    return sampler, open_feed(data, sampler, Prepare(data, torch.device("cpu")), learning, timeout=60)


def train(data: Dataset, memory: int, steps: int, seed: int, sampling: Sampling) -> Outcome:
    """Train for ``steps`` with rows through the feed that ``memory`` bytes allow."""
    learning = settings(memory, steps, seed)
    sampler, feed = opened(data, learning, sampling)
    trainer = Trainer(model(), cross_entropy, learning)
    rows = data.load()
    x, y = torch.from_numpy(rows.inputs[0]), torch.from_numpy(rows.target)
    reported: list[tuple[float, float, float]] = []
    exact: list[tuple[float, float, float]] = []
    losses, largest = [], 0.0
    for step in range(steps):
        measure = (step + 1) % REPORT_EVERY == 0
        batch = feed(step, steps)
        largest = max(largest, float(batch.draw.coefficients.max()))
        truth = measured(trainer.model, x, y, sampler.q.pop(step)) if measure and step >= steps // 2 else None
        result = trainer.step(step, batch.inputs, batch.targets, batch.draw.coefficients, norms=True, measure=measure)
        losses.append(result.loss)
        sampler.learned(step, batch.draw, result, measure=measure)
        if measure:
            row = sampler.report(step + 1)
        if truth is not None:
            exact.append(truth)
            reported.append((float(np.mean(losses[-REPORT_EVERY:])), row["variance_uniform"], row["gain"]))
    feed.close()
    with torch.no_grad():
        final = float(cross_entropy(trainer.model(x), y).mean())
    seen, true = np.mean(reported, axis=0), np.mean(exact, axis=0)
    return Outcome(final, seen[0], true[0], seen[1], true[1], seen[2], true[2], largest, feed.reason.split(":")[0])


def measured(
    network: nn.Module, x: torch.Tensor, y: torch.Tensor, q: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Return the mean loss, the uniform variance and the gain of the proposal q (N,), from all examples."""
    network.zero_grad()
    loss = cross_entropy(network(x), y).mean()
    loss.backward()
    mean = float(nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))
    norms = gradient_norms(network, cross_entropy, x, y).double().numpy()
    variance = gradient_variance(norms, q, mean)
    return float(loss.detach()), variance.uniform, variance.gain


def window_variance(data: Dataset, memory: int, windows: int, sampling: Sampling) -> float:
    """Return the trace of the covariance of the mean gradient of 50 minibatches, at fixed parameters."""
    learning = settings(memory, WINDOW * (windows + 4), 1)
    sampler, feed = opened(data, learning, sampling)
    rows = data.load()
    gradients = per_example_gradients(model(), torch.from_numpy(rows.inputs[0]), torch.from_numpy(rows.target))
    norms = np.linalg.norm(gradients, axis=1).astype(np.float32)
    for chunk in range(sampler.sampler.n_chunks):
        sampler.update(chunk, norms[chunk * 4 * ROWS : (chunk + 1) * 4 * ROWS], 0)
    means = []
    for step in range(learning.steps):
        draw = feed(step, learning.steps).draw
        means.append(draw.coefficients @ gradients[draw.indices] / BATCH)
    feed.close()
    blocks = np.reshape(means[4 * WINDOW :], (windows, WINDOW, -1)).mean(1)
    return float(np.square(blocks - gradients.mean(0)).sum(1).mean())


def per_example_gradients(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> NDArray[np.float32]:
    """Return (N, P) the gradient of each example's loss."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(torch.func.functional_call(network, parameters, (x[None],)), y[None])[0]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    return torch.cat([g.flatten(1) for g in found.values()], 1).numpy()


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use small sizes: a test that it runs")
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps; 80 are an epoch")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    steps, seeds, windows = (80, 1, 2) if options.tiny else (options.steps, options.seeds, 200)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="isgd-benchmark-"))
    sampling = Sampling(gate="open", max_coefficient=5.0)
    try:
        data = write(folder / "d")
        memories = {"direct": 2 * data.nbytes, "feed": data.nbytes * RESIDENT // CHUNKS}
        found: dict[str, object] = {}
        for name, memory in memories.items():
            runs = [asdict(train(data, memory, steps, seed, sampling)) for seed in range(seeds)]
            kind = runs[0].pop("feed")
            print(f"\n{name}: {kind}, {steps} steps, mean of {seeds} runs")
            means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            for key, value in means.items():
                print(f"  {key.replace('_', ' '):<22}{value:>10.3f}")
            means["window_variance"] = window_variance(data, memory, windows, sampling)
            found[name] = means
        ratio = found["feed"]["window_variance"] / found["direct"]["window_variance"]  # type: ignore[index]
        print(f"\nvariance of the mean gradient of {WINDOW} minibatches, feed to direct: {ratio:.2f}")
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
