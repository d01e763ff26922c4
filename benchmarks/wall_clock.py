"""Seconds to a training loss on the cores of this machine: learners with feedback, without, and plain PyTorch.

    python benchmarks/wall_clock.py                     # Fashion-MNIST, three seeds; an interrupted one resumes
    python benchmarks/wall_clock.py --table             # summarise the existing runs
    python benchmarks/wall_clock.py --steps 64 --shares 1 --rates 0.04 --seeds 0 --to out.jsonl   # as tests do

Every run is a process of its own: model and settings of the pipeline ``fashion-mnist``, minibatches of 128, a rate that
falls to 0 along a cosine. ``plain`` is an ordinary loop over tensors in memory, reshuffled in every epoch, with torch's
own threads on all cores. The others are ``isgd.fit`` with nothing scored: ``uniform`` and ``feedback`` with a learner
per core, which sum their gradients in every step or, with ``averaged``, take eight steps each before they average; one
learner with all cores; and, with ``roles``, a learner per core that may score instead. With ``rate gain`` the rate
follows the gain (``Learning.learning_rate_gain``). As a rate that falls reaches its loss only at the end, arms with
feedback are run with shorter horizons as well (``--shares``): the shortest that ends with at most the loss of another
arm's whole horizon is compared with its seconds. Seconds are those of training, without start-up; losses are means over
all training examples afterwards. Each arm has the best of the same rates, by seed. Needs
Debian's dataset-fashion-mnist, or its files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "wall_clock.jsonl"
STEPS, BATCH = 8000, 128
RATES, SHARES, SEEDS = (0.04, 0.08), (0.5, 0.625, 0.75), (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uniform": {"learners": 2, "uniform": True},
    "feedback": {"learners": 2},
    "uniform, averaged": {"learners": 2, "uniform": True, "sync_every": 8},
    "feedback, averaged": {"learners": 2, "sync_every": 8},
    "one learner, feedback": {"learners": 1},
    "feedback, roles": {"learners": 2, "roles": True},
    "feedback, roles, rate gain": {"learners": 2, "roles": True, "learning_rate_gain": True},
    "one learner, feedback, rate gain": {"learners": 1, "learning_rate_gain": True},
}
WAIT = 900.0


def plain(data: Any, recipe: Any, steps: int, rate: float, seed: int) -> tuple[float, Any]:
    """Train as a user would without this library; return the seconds and the model."""
    import torch
    from torch.nn.functional import cross_entropy

    from dask_isgd.core import models

    x, y = tensors(data)
    model = models.build(recipe.model, seed)
    momentum = recipe.learning.momentum
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(seed)
    began, order = time.perf_counter(), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(y))
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - began, model


def fitted(
    data: Any,
    recipe: Any,
    steps: int,
    rate: float,
    seed: int,
    *,
    learners: int,
    uniform: bool = False,
    roles: bool = False,
    **settings: Any,
) -> tuple[float, Any]:
    """Train on all cores; return the seconds of training and the model. ``roles``: learners may score instead."""
    import dask_isgd as isgd

    learning = isgd.Learning(
        steps=steps,
        batch_size=BATCH,
        learning_rate=rate,
        momentum=recipe.learning.momentum,
        scheduler="cosine",
        learners=learners,
        seed=seed,
        **settings,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        isgd.LocalCluster(learners, learners=learners) as cluster,
        cluster.get_client() as client,
    ):
        run = isgd.fit(
            client,
            recipe.model,
            data,
            f"{folder}/run",
            learning=learning,
            sampling=isgd.Sampling(uniform=uniform),
            scoring=isgd.Scoring(passes="auto" if roles else 0),
        )
        run.wait(timeout=WAIT)
        return float(run.history["seconds"][-1]), run.model()


def tensors(data: Any) -> tuple[Any, Any]:
    import torch

    from dask_isgd.core.batch import Prepare

    rows = data.load()
    (x,), y = Prepare(data, torch.device("cpu"))(rows.inputs, rows.target)
    return x, y


def one(arm: str, steps: int, rate: float, seed: int, folder: Path) -> dict[str, float]:
    """Train once, in this process and its workers; return seconds, training loss and validation error."""
    import torch
    from torch.nn.functional import cross_entropy

    from dask_isgd.pipelines import PIPELINES
    from dask_isgd.storage import Dataset

    pipeline = PIPELINES["fashion-mnist"]
    data = Dataset(pipeline.prepare(str(folder / "fashion-mnist.zarr")), group="train")
    if arm == "plain":
        seconds, model = plain(data, pipeline.recipe, steps, rate, seed)
    else:
        seconds, model = fitted(data, pipeline.recipe, steps, rate, seed, **ARMS[arm])
    model.eval()
    with torch.no_grad():
        (x, y), (held_x, held_y) = tensors(data), tensors(data.split("test"))
        loss = float(cross_entropy(torch.cat([model(part) for part in x.split(4096)]), y))
        error = float((model(held_x).argmax(1) != held_y).float().mean())
    return {"seconds": seconds, "loss": loss, "error": error}


def runs(options: argparse.Namespace) -> list[tuple[str, float, float, int]]:
    """Return arm, share of the steps, rate and seed of each run; arms and shares in turn."""
    return [
        (arm, share, rate, seed)
        for seed in options.seeds
        for rate in options.rates
        for arm in options.arms
        for share in (options.shares if "feedback" in arm else [1.0])
    ]


def best(rows: list[dict[str, Any]], arm: str, share: float, seed: int) -> dict[str, Any]:
    """Return the run with the lowest loss over the rates."""
    of = [row for row in rows if (row["arm"], row["share"], row["seed"]) == (arm, share, seed)]
    return min(of, key=lambda row: float(row["loss"]))


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line per run and seed, and the comparisons."""
    lines = [
        "| seed | arm | steps | rate | seconds | training loss | validation error |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios: dict[tuple[str, str], list[float]] = {}
    for seed in sorted({row["seed"] for row in rows}):
        kinds = sorted({(row["arm"], row["share"]) for row in rows if row["seed"] == seed})
        found = {kind: best(rows, *kind, seed) for kind in kinds}
        lines += [
            f"| {seed} | {arm} | {row['steps']} | {row['rate']:g} | {row['seconds']:.1f} | {row['loss']:.4f} "
            f"| {row['error']:.2%} |"
            for (arm, _), row in found.items()
        ]
        for other in ("uniform", "uniform, averaged", "plain"):
            if (other, 1.0) not in found:
                continue
            goal = found[other, 1.0]
            for ours in sorted({arm for arm, _ in found if "feedback" in arm}):
                runs = [row for (arm, _), row in found.items() if arm == ours and row["loss"] <= goal["loss"]]
                fastest = min((row["seconds"] for row in runs), default=float("inf"))
                ratios.setdefault((ours, other), []).append(fastest / goal["seconds"])
    lines.append("")
    for (ours, other), found_ratios in ratios.items():
        middle, each = statistics.median(found_ratios), ", ".join(f"{x:.2f}" for x in found_ratios)
        lines.append(
            f"{ours}: the final loss of {other} after {middle:.2f} of its seconds in the median ({each}; inf: at none "
            "of these horizons)"
        )
    return lines


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole horizon")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="horizons of feedback")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the prepared dataset")
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--one", nargs=4, metavar=("ARM", "STEPS", "RATE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        arm, steps, rate, seed = options.one
        print(json.dumps(one(arm, int(steps), float(rate), int(seed), options.data)))
        return []
    rows = [json.loads(line) for line in options.to.read_text().splitlines()] if options.to.exists() else []
    there = {(row["arm"], row["share"], row["rate"], row["seed"]) for row in rows}
    for arm, share, rate, seed in [] if options.table else runs(options):
        if (arm, share, rate, seed) in there:
            continue
        steps = round(share * options.steps)
        command = [
            sys.executable,
            __file__,
            "--data",
            str(options.data),
            "--one",
            arm,
            str(steps),
            str(rate),
            str(seed),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, timeout=2 * WAIT)
        if done.returncode:
            raise SystemExit(f"{arm} at rate {rate:g} ended with {done.returncode}; its errors are above")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"arm": arm, "share": share, "steps": steps, "rate": rate, "seed": seed, **found})
        with options.to.open("a") as file:
            print(json.dumps(rows[-1]), file=file)
        print(json.dumps(rows[-1]), flush=True)
    print("\n".join(summary(rows)))
    return rows


if __name__ == "__main__":
    main()
