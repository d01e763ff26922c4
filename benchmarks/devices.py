"""What devices give as learners, with and without importance sampling, in virtual time on Fashion-MNIST.

    python benchmarks/devices.py                      # the whole grid, hours on one core; an interrupted one resumes
    python benchmarks/devices.py --seeds 0 --rates 0.4 --updates 2800
    python benchmarks/devices.py --tiny               # what the tests run
    python benchmarks/devices.py --table              # summarise the existing runs

An arm has one learner or more, each with 64 examples of every minibatch, and a rate that falls to 0 along a cosine
whose horizon is a share of ``UPDATES``: three epochs of one learner, or eight and a half. The question of each
comparison: does an arm end its shorter horizon with at most the training loss that the other one ends its whole horizon
with? Both have the best of the same rates, by the median over seeds, and are paired by seed. Virtual time counts
updates: what norms cost is in ``cost.py``.

``--problem shuttle`` or ``land-mask``: only whether one of two or five devices does more for the run if it scores, all
the time, while the others share the minibatches of all (rate 0.2, 4,000 updates; the same MLP).

Writes one JSON line per run to ``results/devices.jsonl``, or ``devices-PROBLEM.jsonl``. The simulation is in
``simulation.py``. Data: Debian's dataset-fashion-mnist, and what the pipelines need.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from simulation import BATCH, Images, Policy, Simulation, images, numbers

RESULTS = Path(__file__).parent / "results" / "devices.jsonl"
UPDATES = (2800, 8000)
EXAMPLES = 60_000
RATES, SEEDS = (0.2, 0.4), range(5)

FORMER = {"smoothing": 0.7}
"""Settings before smoothing followed the rate and averages the age of weights."""
POLICIES = {
    "uniform": Policy(sampling={"uniform": True}),
    "default": Policy(sampling={"smoothing": 0.3, "ema_steps": 1000.0}),  # `fit`'s for a rate that falls along a cosine
    "rate gain": Policy(sampling={"smoothing": 0.3, "ema_steps": 1000.0}, rate_gain=True),
    "any age": Policy(sampling={"smoothing": 0.3}),
    "counted averages": Policy(sampling={"smoothing": 0.3, "ema_decay": 0.0}, tau=1000.0),
    "former": Policy(sampling=FORMER),
    "former, counted averages": Policy(sampling={"smoothing": 0.7, "ema_decay": 0.0}, tau=1000.0),
    "default, chosen from 3 minibatches": Policy(sampling={"smoothing": 0.3, "ema_steps": 1000.0}, presample=3),
    "former, rate gain": Policy(sampling=FORMER, rate_gain=True),
    "former, one pass": Policy(sampling=FORMER, pass_from=300),
    "counted averages, one pass": Policy(sampling={"smoothing": 0.3, "ema_decay": 0.0}, tau=1000.0, pass_from=300),
}
SCORE_COST = 0.75
"""Cost of an example's norm, in costs of learning it: between two thirds (no gradients of weights) and one."""


class Arm(NamedTuple):
    learners: int
    policy: str
    speed: float
    """Examples scored per example that one learner learns: scorers that are as fast as learners score about 1 each."""

    def __str__(self) -> str:
        scored = "" if self.policy == "uniform" else f", {self.speed:g} scored per learned"
        return f"{self.learners} learner{'s' * (self.learners > 1)}, {self.policy}{scored}"


class Comparison(NamedTuple):
    """Whether ``arm`` needs at most ``share`` of the updates of ``other``; in short runs only unless ``also_long``."""

    arm: Arm
    share: float
    other: Arm
    also_long: bool = True


def one_pass(learners: int, policy: str) -> Arm:
    """Return an arm all of whose devices but one score everything once; the one learns alone meanwhile."""
    return Arm(learners, policy, learners * (learners - 1) / SCORE_COST)


def one_scores(learners: int) -> Comparison:
    """Compare an arm of which one device scores all the time while the others learn with one of which all learn."""
    arm = Arm(learners, "default", learners / (learners - 1) / SCORE_COST)
    return Comparison(arm, (learners - 1) / learners, Arm(learners, "default", 0))


def lost(arm: Arm) -> int:
    """Return for how many updates of all learners the one of ``one_pass`` learns alone, beyond those that it makes."""
    if POLICIES[arm.policy].pass_from is None:
        return 0
    return round(EXAMPLES / (arm.speed * BATCH) * (arm.learners - 1))


ONE, TWO, FIVE = (Arm(learners, "uniform", 0) for learners in (1, 2, 5))
FEEDBACK, TWO_FEEDBACK, FIVE_FEEDBACK = (Arm(learners, "default", 0) for learners in (1, 2, 5))
SCORED = Arm(1, "default", 4)
COMPARISONS = (
    Comparison(FEEDBACK, 0.70, ONE),
    Comparison(SCORED, 0.70, ONE),
    Comparison(FIVE, 0.35, ONE),
    Comparison(FIVE_FEEDBACK, 0.35, ONE),
    Comparison(FIVE_FEEDBACK, 0.75, FIVE),
    Comparison(TWO_FEEDBACK, 0.75, TWO),
    Comparison(Arm(1, "rate gain", 0), 0.70, ONE),
    Comparison(Arm(5, "rate gain", 0), 0.35, ONE),
    Comparison(Arm(5, "rate gain", 0), 0.75, FIVE),
    Comparison(Arm(2, "rate gain", 0), 0.75, TWO),
    Comparison(Arm(2, "former", 0), 1.0, TWO_FEEDBACK),
    # what a pass costs: its devices make no updates meanwhile
    Comparison(one_pass(2, "former, one pass"), 1.0, Arm(2, "former", 0)),
    Comparison(one_pass(2, "counted averages, one pass"), 1.0, TWO_FEEDBACK),
    one_scores(2),
    one_scores(5),
    # as many updates, and about as much work: a forward pass is a third of a step
    *(
        Comparison(Arm(1, "default, chosen from 3 minibatches", 0), share, FEEDBACK, also_long=False)
        for share in (1.0, 0.5)
    ),
    *(
        Comparison(Arm(1, policy, speed), 1.0, Arm(1, other, speed), also_long=False)
        for policy, other in (
            ("former", "default"),
            ("any age", "default"),
            ("counted averages", "default"),
            ("former, counted averages", "former"),
            ("former, rate gain", "former"),
        )
        for speed in (0, 4)
    ),
)


class Run(NamedTuple):
    arm: Arm
    share: float
    """The horizon as a share of ``updates``."""
    updates: int
    rate: float
    seed: int


ROLES = (one_scores(2), Comparison(TWO_FEEDBACK, 1.0, TWO), one_scores(5), Comparison(FIVE_FEEDBACK, 1.0, FIVE))
"""What other problems than Fashion-MNIST are for."""


def grid(
    seeds: list[int],
    rates: list[float],
    updates: Sequence[int] = UPDATES,
    comparisons: Sequence[Comparison] = COMPARISONS,
) -> Iterator[Run]:
    """Yield the runs of all comparisons once each, seed by seed."""
    for seed in seeds:
        for whole in updates:
            chosen = [c for c in comparisons if c.also_long or whole == min(UPDATES)]
            arms = [arm for c in chosen for arm in ((c.other, 1.0), (c.arm, c.share))]
            for rate in rates:
                yield from (Run(*arm, whole, rate, seed) for arm in dict.fromkeys(arms))


def simulate(run: Run, data: Images, **sizes: int) -> dict[str, Any]:
    simulation = Simulation(
        data,
        POLICIES[run.arm.policy],
        rate=run.rate,
        seed=run.seed,
        speed=run.arm.speed,
        learners=run.arm.learners,
        decay=True,
        **sizes,
    )
    found = simulation.run(max(1, round(run.share * run.updates) - lost(run.arm)))
    kept = ("final_loss", "test_error", "diverged", "spikes", "opened", "seconds")
    return {**run._asdict(), **{name: found[name] for name in kept}, "gain": found["gain"][-1:]}


def load(path: Path) -> dict[Run, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {Run(Arm(*row["arm"]), row["share"], row["updates"], row["rate"], row["seed"]): row for row in rows}


Final = dict[int, dict[str, Any]]
"""Runs by seed."""


def best(rows: dict[Run, dict[str, Any]], arm: Arm, share: float, updates: int) -> tuple[float, Final]:
    """Return the rate with the lowest median of final losses, and its runs; a run that diverged counts as infinite."""
    rates = {run.rate for run in rows if run[:3] == (arm, share, updates)}
    found = {rate: {r.seed: row for r, row in rows.items() if r[:4] == (arm, share, updates, rate)} for rate in rates}
    rate = min(found, key=lambda rate: statistics.median(loss(row) for row in found[rate].values()))
    return rate, found[rate]


def loss(row: dict[str, Any]) -> float:
    return float("inf") if row["diverged"] else float(row["final_loss"])


def table(rows: dict[Run, dict[str, Any]]) -> list[str]:
    """Return medians over seeds for every arm, horizon and rate."""
    lines = ["| arm | updates | rate | seeds | final loss | test error | diverged |", "|---|---|---|---|---|---|---|"]
    for arm, share, updates, rate in sorted({run[:4] for run in rows}):
        runs = [row for run, row in rows.items() if run[:4] == (arm, share, updates, rate)]
        losses, errors = [loss(row) for row in runs], [row["test_error"] for row in runs]
        lines.append(
            f"| {arm} | {round(share * updates):,} | {rate:g} | {len(runs)} | {statistics.median(losses):.4f} "
            f"({min(losses):.4f} to {max(losses):.4f}) | {statistics.median(errors):.2%} "
            f"| {sum(row['diverged'] for row in runs)} |"
        )
    return lines


def summary(rows: dict[Run, dict[str, Any]], comparisons: Sequence[Comparison] = COMPARISONS) -> list[str]:
    """Return one line for each comparison of which both arms have runs, and one for each arm beside uniform draws."""
    lines = []
    there = {run[:3] for run in rows}
    for updates in sorted({run.updates for run in rows}):
        for c in comparisons:
            if {(c.arm, c.share, updates), (c.other, 1.0, updates)} <= there:
                (rate, ours), (its_rate, its) = best(rows, c.arm, c.share, updates), best(rows, c.other, 1.0, updates)
                ratios = [loss(ours[seed]) / loss(its[seed]) for seed in sorted(ours.keys() & its.keys())]
                lines.append(
                    f"{c.arm} (rate {rate:g}) after {c.share:g} of {updates:,} updates of {c.other} (rate "
                    f"{its_rate:g}): final loss {statistics.median(ratios):.3f} of its in the median, "
                    f"{', '.join(f'{x:.2f}' for x in ratios)}: "
                    f"{'reached' if statistics.median(ratios) <= 1 else 'not reached'}"
                )
    for arm in sorted({run.arm for run in rows if run.arm.policy != "uniform"}):
        uniform = Arm(arm.learners, "uniform", 0)
        pairs: dict[tuple[int, float], list[float]] = {}
        for run, row in rows.items():
            other = rows.get(run._replace(arm=uniform))
            if run.arm == arm and other is not None:
                pairs.setdefault((run.updates, run.rate), []).append(loss(row) / loss(other))
        for (updates, rate), ratios in sorted(pairs.items()):
            lines.append(
                f"{arm}, {updates:,} updates, rate {rate:g}: final loss over that of uniform draws at the same rate "
                f"and horizon, mean {statistics.mean(ratios):.3f}, largest {max(ratios):.3f} of {len(ratios)} pairs"
            )
    return lines


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use small sizes: a test that it runs")
    parser.add_argument("--table", action="store_true", help="only summarise existing runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="run only these seeds")
    parser.add_argument("--rates", type=float, nargs="+", help="run only these rates")
    parser.add_argument("--updates", type=int, nargs="+", help="run only these horizons")
    parser.add_argument("--problem", choices=["fashion-mnist", "shuttle", "land-mask"], default="fashion-mnist")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where a problem's data are kept")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args(argv)
    name = arguments.problem
    own = name != "fashion-mnist"
    comparisons = ROLES if own else COMPARISONS
    results = arguments.results or (RESULTS.with_name(f"devices-{name}.jsonl") if own else RESULTS)
    rates, updates = arguments.rates or ([0.2] if own else RATES), arguments.updates or ([4000] if own else UPDATES)
    torch.set_num_threads(1)
    if arguments.tiny:
        data = images(4000)
        rows = {run: simulate(run, data, width=32) for run in grid([0], [0.2], [200])}
    else:
        rows = load(results)
        every = [] if arguments.table else grid(arguments.seeds, list(rates), updates, comparisons)
        todo = [run for run in every if run not in rows]
        data = (numbers(name, str(arguments.data / f"{name}.zarr")) if own else images()) if todo else None
        for run in todo:
            assert data is not None
            rows[run] = simulate(run, data)
            with results.open("a") as file:
                file.write(json.dumps(rows[run]) + "\n")
            print(*run, f"{loss(rows[run]):.4f}", flush=True)
    print("\n".join([*table(rows), "", *summary(rows, comparisons)]))
    return list(rows.values())


if __name__ == "__main__":
    main()
