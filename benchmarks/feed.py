"""The speed of reading random rows, against ``X[idx]`` in RAM, and chunks in order, against a bare ``z[a:b]`` loop.

    python benchmarks/feed.py            # 600 MB, a few minutes on one core
    python benchmarks/feed.py --tiny     # what the tests run

Every method yields the same minibatches of 128 rows of 3,072 bytes as torch tensors, in one process. A
figure is the median over minibatches, or the mean if they are drawn ahead (chunks are read in between); the ratio is to
``X[idx]``, plain numpy, of the same run. Other libraries that read Zarr are measured if they are installed.
The last lines train an MLP from memory and with a memory budget of a tenth of the data.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from dask_isgd.config import Learning
from dask_isgd.core.batch import Prepare, as_tensor
from dask_isgd.core.loss import cross_entropy
from dask_isgd.errors import DataError
from dask_isgd.learner.feed import open_feed, open_source
from dask_isgd.learner.feed.lookahead import Lookahead
from dask_isgd.learner.trainer import Trainer
from dask_isgd.sampling import Draw
from dask_isgd.sampling.draws import uniform
from dask_isgd.scorer.chunk_reader import CachedChunkReader
from dask_isgd.storage import Dataset, write_dataset

BATCH, CHUNK = 128, 512


class Uniform:
    """Uniform draws: the benchmark measures the feed, not the sampler."""

    gate_step = -1

    def __init__(self, n: int) -> None:
        self.n = n

    def draw(self, step: int, attempt: int = 0) -> Draw:
        return uniform(self.n, np.random.default_rng(step).random(BATCH))

    def unreadable(self, error: DataError) -> None:
        raise error


def write(folder: Path, n: int) -> dict[str, Dataset]:
    """Write the same rows uncompressed and as zstd. Half of each is constant: they compress to half the size."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    image[:, :, 16:] = 7
    arrays = {"image": image, "label": rng.integers(0, 10, n)}
    found = {}
    for name, compressed in (("raw", False), ("zstd", True)):
        write_dataset(
            folder / name,
            "train",
            arrays,
            inputs="image",
            target="label",
            chunk_size=CHUNK,
            classes=10,
            compressed=compressed,
        )
        found[name] = Dataset(folder / name)
    return found


def rate(minibatch: Callable[[int], Any], batches: int, *, mean: bool = False) -> float:
    """Return rows per CPU second of all threads: the speed of one core, whatever else runs on the machine."""
    for step in range(max(1, batches // 5)):
        minibatch(step)
    seconds = []
    for step in range(batches):
        began = time.process_time()
        minibatch(step)
        seconds.append(time.process_time() - began)
    return BATCH / (statistics.fmean(seconds) if mean else statistics.median(seconds))


def random_rows(data: dict[str, Dataset], batches: int) -> Iterator[tuple[str, float]]:
    n, size = len(data["raw"]), data["raw"].nbytes
    rows = data["raw"].load()
    draws = Uniform(n)

    def plain(step: int, image: Any = rows.inputs[0], label: Any = rows.target) -> Any:
        indices = draws.draw(step).indices
        return image[indices], label[indices]

    yield "X[idx] in RAM (numpy)", rate(plain, batches)
    del rows, plain
    tenth = size // 10
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("in memory", "raw", {"cache_memory": 2 * size}),
        ("rows of uncompressed chunks", "raw", {"cache_memory": tenth}),
        ("local copy of zstd", "zstd", {"cache_memory": tenth, "cache_disk": 2 * size}),
        ("drawn ahead, memory 1/10, zstd", "zstd", {"cache_memory": tenth}),
        ("drawn ahead, memory 1/2, zstd", "zstd", {"cache_memory": 5 * tenth, "lookahead_steps": 2000}),
    ]
    for name, kind, settings in ways:
        learning = Learning(steps=1, batch_size=BATCH, **{"cache_disk": 0, **settings})
        source = open_source(data[kind], draws, learning, timeout=60)
        if hasattr(source, "wait"):
            source.wait()
        ahead, steps = isinstance(source, Lookahead), itertools.count()

        def minibatch(_: int, source: Any = source, steps: Iterator[int] = steps) -> Any:
            _, rows = source.minibatch(next(steps), 10**9)
            return [as_tensor(array) for array in (*rows.inputs, rows.target)]

        for step in range(3 * batches if ahead else 0):  # until each chunk is read at its own time
            minibatch(step)
        yield name, rate(minibatch, batches, mean=ahead)
        source.close()
    yield from others(data["zstd"], max(2, batches // 100))


def others(dataset: Dataset, batches: int) -> Iterator[tuple[str, float]]:
    """Measure common alternatives on the compressed rows."""
    image, label = (dataset.arrays[name] for name in ("image", "label"))
    draws = Uniform(len(dataset))

    def naive(step: int) -> Any:
        indices = draws.draw(step).indices
        return torch.from_numpy(image.oindex[indices]), torch.from_numpy(label.oindex[indices])

    yield "oindex", rate(naive, batches)

    class Examples(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, i: int) -> Any:
            return image[i], label[i]

    loader = torch.utils.data.DataLoader(Examples(), BATCH, shuffle=True)
    iterator = iter(loader)
    yield "DataLoader over z[i], shuffled", rate(lambda _: next(iterator), batches)
    if importlib.util.find_spec("xbatcher") is None:
        return
    import xarray
    import xbatcher

    opened = xarray.open_zarr(dataset.url, group="train", chunks=None).rename(sample="row")
    order = np.random.default_rng(0).permutation(len(dataset))[: BATCH * (2 * batches + 4)]
    generator = iter(xbatcher.BatchGenerator(opened.isel(row=order), {"row": BATCH}))

    def batch(_: int) -> Any:
        found = next(generator)
        return torch.from_numpy(found.image.values), torch.from_numpy(found.label.values)

    yield "xbatcher, shuffled", rate(batch, batches)


def scans(data: dict[str, Dataset], times: int) -> Iterator[tuple[str, float]]:
    """Read chunks in order, 16 at a time: rows per CPU second, the best of ``times`` passes."""
    for kind, dataset in data.items():
        z = {name: zarr.open_array(array.store, path=array.path, mode="r") for name, array in dataset.arrays.items()}
        span = 16 * CHUNK
        ends = [(a, min(a + span, len(dataset))) for a in range(0, len(dataset), span)]

        def bare(z: Any = z, ends: Any = ends) -> None:
            for a, b in ends:
                [array[a:b] for array in z.values()]

        def scanned(scan: CachedChunkReader, dataset: Any = dataset, ends: Any = ends) -> None:
            for a, b in ends:
                for _ in scan.batches(dataset, a, b, 2048):
                    pass

        kept = CachedChunkReader(2 * dataset.nbytes)
        scanned(kept)
        best: dict[str, list[float]] = {"bare": [], "scan": [], "kept": []}
        for _ in range(times):
            for name, run in (
                ("bare", bare),
                ("scan", lambda: scanned(CachedChunkReader(0))),
                ("kept", lambda kept=kept: scanned(kept)),
            ):
                began = time.process_time()
                run()
                best[name].append(time.process_time() - began)
        for name, label in (("bare", "bare z[a:b]"), ("scan", "scan"), ("kept", "scan, cached by the last pass")):
            yield f"{kind}: {label}", len(dataset) / min(best[name])


def model() -> torch.nn.Module:
    width = [3072, 1024, 1024, 10]
    layers: list[torch.nn.Module] = [torch.nn.Flatten()]
    for i, o in itertools.pairwise(width):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


class Scaled(Prepare):
    """Prepares batches as if the dataset had a normalisation."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset, torch.device("cpu"))
        self._constants = [(torch.tensor(128.0), torch.tensor(64.0))]


def training(data: dict[str, Dataset], steps: int) -> Iterator[tuple[str, float]]:
    """Measure an MLP's steps per second: rounds of all methods in turn, the median round."""
    dataset = data["raw"]
    ways = {
        "in memory": (data["raw"], 2 * dataset.nbytes, 0),
        "rows of uncompressed chunks, budget 1/10": (data["raw"], dataset.nbytes // 10, 0),
        "local copy of zstd, budget 1/10": (data["zstd"], dataset.nbytes // 10, 2 * dataset.nbytes),
        "drawn ahead on zstd, budget 1/10": (data["zstd"], dataset.nbytes // 10, 0),
    }
    feeds, speeds = {}, {name: [] for name in ways}
    for name, (of, memory, disk) in ways.items():
        learning = Learning(steps=10**6, batch_size=BATCH, cache_memory=memory, cache_disk=disk)
        feeds[name] = open_feed(of, Uniform(len(of)), Scaled(of), learning, timeout=60)
        trainer = Trainer(model(), cross_entropy, Learning(steps=10**6, device="cpu"))
    at = dict.fromkeys(ways, 0)
    for _ in range(7):
        for name, feed in feeds.items():
            began = 0.0
            for step in range(at[name], at[name] + steps + 5):
                if step == at[name] + 5:
                    began = time.perf_counter()
                batch = feed(step, 10**6)
                trainer.step(step, batch.inputs, batch.targets, batch.draw.coefficients, norms=True)
            speeds[name].append(steps / (time.perf_counter() - began))
            at[name] += steps + 5
    for name, feed in feeds.items():
        feed.close()
        yield name, statistics.median(speeds[name])


def table(title: str, rows: Iterator[tuple[str, float]], unit: str) -> dict[str, float]:
    """Print rows as they are measured; return their ratios to the first."""
    print(f"\n{title}\n{'':<45}{unit:>12}{'ratio':>9}")
    found: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for name, value in rows:
        found[name] = value
        first = found["bare" if "bare" in found else next(iter(found))]
        if ": " in name:  # the ratio is to the bare loop of the same kind
            first = found[f"{name.split(':')[0]}: bare z[a:b]"]
        ratios[name] = round(value / first, 5)
        print(f"{name:<45}{value:>12,.0f}{value / first:>9.4f}", flush=True)
    return ratios


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use small sizes: a test that it runs")
    parser.add_argument("--rows", type=int, default=200_000, help="number of rows, 3,080 bytes each")
    options = parser.parse_args(argv)
    n, batches, times, steps = (6_000, 10, 1, 3) if options.tiny else (options.rows, 1000, 3, 60)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="isgd-benchmark-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = write(folder, n)
            print(f"{data['raw'].nbytes / 1e6:,.0f} MB, minibatches of {BATCH}, chunks of {CHUNK}")
            found = {
                "rows": table("random rows", random_rows(data, batches), "rows/CPU s"),
                "scan": table("chunks in order", scans(data, times), "rows/CPU s"),
                "training": table("MLP 3072-1024-1024-10", training(data, steps), "steps/s"),
            }
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
