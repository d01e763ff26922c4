"""A plain PyTorch loop outside Dask: what a user would run without this library.

python benchmarks/plain.py [--threads 1] [--steps 2000] [--batch-size 64]

Fashion-MNIST in memory, reshuffled in every epoch, MLP 784-512×3-10, Nesterov SGD; the process has the
system's own environment and allocator. Prints a line of JSON: steps per second after a tenth of the steps, page faults
per step, and the share of CPU time that the kernel took. Compare with ``steps_per_second`` of

dask isgd train fashion-mnist --uniform --steps 2000 --json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dask_isgd.pipelines.datasets.idx import read_idx
from dask_isgd.pipelines.models import fashion_mnist

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Of Debian's package dataset-fashion-mnist."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images, labels = (read_idx(FOLDER / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    x = torch.from_numpy(np.float32(images.reshape(len(images), -1)) / 255)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    y = torch.from_numpy(labels.astype(np.int64))
    model = fashion_mnist()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    first = options.steps // 10
    taken = 0
    while taken < options.steps:
        for rows in torch.randperm(len(x)).split(options.batch_size):
            if taken == first:
                began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            taken += 1
            if taken == options.steps:
                break
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    result = {
        "threads": options.threads,
        "steps_per_second": round((taken - first) / seconds, 1),
        "page_faults_per_step": round((after.ru_minflt - before.ru_minflt) / (taken - first), 1),
        "system_share": round(system / (system + user), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
