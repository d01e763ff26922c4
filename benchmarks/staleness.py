"""The cost of stale weights and the benefit of importance sampling, in virtual time on Fashion-MNIST.

    python benchmarks/staleness.py                  # the whole grid: tens of core-minutes; an interrupted one resumes
    python benchmarks/staleness.py --tiny           # what the tests run
    python benchmarks/staleness.py --table          # summarise the existing runs

Writes one JSON line per run to ``results/staleness.jsonl`` and prints the table. The simulation is in
``simulation.py``. The grid: the defaults at speed 4 and uniform draws, at four learning rates and
five seeds; every other policy and speed at one rate and one seed.

Data: Debian's dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from simulation import EVALUATE_EVERY, Images, Policy, Simulation, images

from dask_isgd import config

RESULTS = Path(__file__).parent / "results" / "staleness.jsonl"
RATES, SEEDS, UPDATES = (0.05, 0.1, 0.2, 0.4), range(5), 8000
ONE_RATE = 0.2

POLICIES = {
    "uniform": Policy(sampling={"uniform": True}),
    "default": Policy(),
    "always open": Policy(sampling={"gate": "open"}),
    "no inertia": Policy(sampling={"ema_decay": 0.0}),
    "no feedback": Policy(sampling={"feedback": False}),
    "no clipping": Policy(clip=None),
    "smoothing 0.1": Policy(sampling={"smoothing": 0.1}),
    "smoothing 0.3": Policy(sampling={"smoothing": 0.3}),
    "smoothing 0.5": Policy(sampling={"smoothing": 0.5}),
    "smoothing 1": Policy(sampling={"smoothing": 1.0}),
    "coefficient ≤ 3": Policy(sampling={"smoothing": 0.0, "max_coefficient": 3.0}),
    "effective sample size 0.5": Policy(sampling={"smoothing": 0.0, "ess_fraction": 0.5}),
    "fade 500": Policy(sampling={"half_life_steps": 500.0}),
    "drop after 500 (biased)": Policy(sampling={"max_age_steps": 500}),
    "power 0.5": Policy(sampling={"exponent": 0.5}),
    "power 1.5": Policy(sampling={"exponent": 1.5}),
    "independent draws": Policy(sampling={"scheme": "independent"}),
    "systematic draws": Policy(sampling={"scheme": "systematic"}),
}
"""Differences from the defaults, by the names in the recorded results. A defensive mixture λ is smoothing λ/(1 - λ)."""


class Run(NamedTuple):
    policy: str
    rate: float
    seed: int
    speed: float
    updates: int

    def __str__(self) -> str:
        return f"{self.policy}, rate {self.rate:g}, seed {self.seed}, speed {self.speed:g}"


def grid() -> Iterator[Run]:
    for seed in SEEDS:
        for rate in RATES:
            for policy in ("default", "uniform"):
                yield Run(policy, rate, seed, 4, UPDATES)
    for speed in (0, 1, 2, 8):
        yield Run("default", ONE_RATE, 0, speed, UPDATES)
    for policy in POLICIES:
        yield Run(policy, ONE_RATE, 0, 4, UPDATES)
    for speed in (1, 0):
        for seed in SEEDS:
            yield Run("default", ONE_RATE, seed, speed, UPDATES)


def simulate(run: Run, data: Images, **sizes: int) -> dict[str, Any]:
    policy = POLICIES[run.policy]
    simulation = Simulation(data, policy, rate=run.rate, seed=run.seed, speed=run.speed, **sizes)
    settings = {"sampling": config.to_mapping(simulation.sampling), "clip": policy.clip}
    return {**run._asdict(), **settings, **simulation.run(run.updates)}


def load(path: Path) -> dict[Run, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {Run(*(row[name] for name in Run._fields)): row for row in rows}


def middle(values: list[float]) -> float:
    finite = [v for v in values if np.isfinite(v)]
    return statistics.median(finite) if finite else float("nan")


def first_below(row: dict[str, Any], loss: float) -> float:
    """Return the updates after which the training loss is first at most ``loss``; infinite: never."""
    below = np.flatnonzero(np.asarray(row["loss"]) <= loss)
    return float((below[0] + 1) * EVALUATE_EVERY) if len(below) else float("inf")


def line(run: Run, row: dict[str, Any]) -> str:
    ratio = row["stale_over_ideal"]
    return (
        f"| {run.policy} | {run.speed:g} | {run.rate:g} | {run.seed} | {row['final_loss']:.4f} "
        f"| {row['test_error']:.2%} | {middle(ratio):.2f} | {middle(ratio[-len(ratio) // 4 :]):.2f} "
        f"| {middle(row['smoothing_factor']):.2f} | {middle(row['staleness_factor']):.2f} | {middle(row['gain']):.2f} "
        f"| {middle(row['ideal_gain']):.2f} | {row['spikes']} | {row['clipped']:.2f} "
        f"| {'yes' if row['diverged'] else ''} |"
    )


HEAD = (
    "| policy | speed | rate | seed | final loss | test error | stale/ideal | late | smoothing | staleness "
    "| gain | ideal gain | spikes | clipped | diverged |\n|" + "---|" * 15
)


def summary(rows: dict[Run, dict[str, Any]]) -> list[str]:
    """Return the headline figures of the existing runs."""
    uniform = {(r.rate, r.seed): row for r, row in rows.items() if r.policy == "uniform" and r.updates == UPDATES}
    default = {
        (r.rate, r.seed): row
        for r, row in rows.items()
        if r.policy == "default" and r.speed == 4 and r.updates == UPDATES and (r.rate, r.seed) in uniform
    }
    if not default:
        return ["there is no pair of runs yet"]
    finals = {rate: middle([row["final_loss"] for (r, _), row in uniform.items() if r == rate]) for rate, _ in uniform}
    best = min(finals, key=finals.__getitem__)
    target = {seed: row["final_loss"] for (rate, seed), row in uniform.items() if rate == best}
    pairs = {key: row for key, row in default.items() if key[1] in target}
    ratios = [row["final_loss"] / target[seed] for (_, seed), row in pairs.items()]
    ratio = [middle(row["stale_over_ideal"]) for row in default.values()]
    more = sum(row["spikes"] > uniform[key]["spikes"] for key, row in default.items())

    def total(what: str) -> str:
        ours, theirs = (sum(row[what] for row in runs.values()) for runs in (default, uniform))
        return f"{ours} (uniform {theirs})"

    out = [
        f"{len(default)} pairs; uniform's best rate {best:g}, its final losses "
        + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in sorted(finals.items())),
        f"stale/ideal, median over a run, median over runs: {middle(ratio):.2f} (worst run {max(ratio):.2f}; aim 2.5)",
        f"final loss over uniform's at its best rate, paired by seed: median {middle(ratios):.3f}, "
        f"largest {max(ratios):.3f}, above 1.1: {sum(not x <= 1.1 for x in ratios)} of {len(ratios)} (aim 1.0, none)",
        f"diverged: {total('diverged')}; spikes: {total('spikes')}, more than uniform's at the same rate and seed "
        f"in {more} of {len(default)} runs",
    ]
    for at in sorted({rate for rate, _ in pairs}):
        here = {seed: row for (rate, seed), row in pairs.items() if rate == at}
        ours = [first_below(row, target[seed]) / UPDATES for seed, row in here.items()]
        theirs = [first_below(uniform[at, seed], target[seed]) / UPDATES for seed in here]
        out.append(
            f"rate {at:g}: updates to uniform's best final loss, of {UPDATES}: median {statistics.median(ours):.3f} "
            f"(each {', '.join(f'{x:.2f}' for x in ours)}; aim 0.55); uniform itself reaches it after "
            f"{statistics.median(theirs):.3f}; final loss over uniform's best, median "
            f"{middle([row['final_loss'] / target[seed] for seed, row in here.items()]):.3f}"
        )
    return out


def wanted(arguments: argparse.Namespace) -> list[Run]:
    return [run for run in grid() if arguments.only in (None, run.policy) and run.seed in arguments.seeds]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use small sizes: a test that it runs")
    parser.add_argument("--table", action="store_true", help="only summarise existing runs")
    parser.add_argument("--only", help="run only this policy")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="run only these seeds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.tiny:
        rows = {}
        data = images(4000)
        for policy in ("uniform", "default"):
            run = Run(policy, 0.1, 0, 4, 600)
            rows[run] = simulate(run, data, width=32)
    else:
        rows = load(arguments.results)
        todo = [] if arguments.table else wanted(arguments)
        data = images() if any(run not in rows for run in todo) else None
        for run in todo:
            if run in rows:
                continue
            assert data is not None
            rows[run] = simulate(run, data)
            with arguments.results.open("a") as file:
                file.write(json.dumps(rows[run]) + "\n")
            print(line(run, rows[run]), flush=True)
    print("\n".join([HEAD, *(line(run, row) for run, row in rows.items()), "", *summary(rows)]))
    return list(rows.values())


if __name__ == "__main__":
    main()
