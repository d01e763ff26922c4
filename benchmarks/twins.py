"""What importance sampling is worth on each pipeline: its recipe, and the same with uniform draws, from the same seed.

    python benchmarks/twins.py                             # every pipeline whose data are there; tens of minutes
    python benchmarks/twins.py digits shuttle --seeds 3
    python benchmarks/twins.py --table                     # summarise the existing runs
    python benchmarks/twins.py digits --steps 60 --to out.jsonl   # what the tests run

The two commands ``dask isgd train NAME`` and ``dask isgd train NAME --uniform`` run one after the other, each with a
cluster of its own on this machine, so that both have the same devices. One line of JSON per pair goes to
``results/twins.jsonl``. Losses are means over the last tenth of the training. ``updates`` and ``seconds`` say
after which share of the uniform run's the weighted run reached the loss that the uniform run ended with: 1 or above
means that weights won nothing. Prepared data are kept in ``--data``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dask_isgd.pipelines import PIPELINES
from dask_isgd.storage import RunDirectory

RESULTS = Path(__file__).parent / "results" / "twins.jsonl"
WINDOW = 0.1
"""Share of the reports over which a loss is averaged."""


def train(name: str, seed: int, data: Path, steps: int | None, *options: str) -> dict[str, Any]:
    """Train in a process of its own, and return the curves and the errors at the end."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        command = ["-m", "dask", "isgd", "train", name, "--json", "--seed", str(seed), "--run", run, *options]
        command += ["--data", str(data / f"{name}.zarr")] + ([] if steps is None else ["--steps", str(steps)])
        done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        if done.returncode:
            raise SystemExit(f"dask isgd train {name} ended with {done.returncode}; its errors are above")
        directory = RunDirectory(run)
        history, evaluations = directory.read_columns(), directory.read_columns("evaluation")
    curves = {column: np.asarray(history[column]) for column in ("step", "seconds", "loss", "gain")}
    last = {column: float(evaluations[column][-1]) for column in ("loss", "error")} if len(evaluations["step"]) else {}
    return {**curves, "validation": last}


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Return the mean over the window that ends at each report; NaN before the first whole one."""
    width = max(1, round(WINDOW * len(loss)))
    means = np.convolve(loss, np.full(width, 1 / width), "valid")
    return np.concatenate([np.full(width - 1, np.nan), means])


def pair(name: str, seed: int, uniform: dict[str, Any], weighted: dict[str, Any]) -> dict[str, Any]:
    """Return what the weighted run gained over the uniform one."""
    target = float(smoothed(uniform["loss"])[-1])
    curve = smoothed(weighted["loss"])
    below = np.flatnonzero(curve <= target)
    reached = {
        what: float(weighted[column][below[0]] / uniform[column][-1]) if len(below) else None
        for what, column in (("updates", "step"), ("seconds", "seconds"))
    }
    runs = {"uniform": uniform, "weighted": weighted}
    return {
        "pipeline": name,
        "seed": seed,
        "steps": int(uniform["step"][-1]),
        "loss": {kind: float(smoothed(run["loss"])[-1]) for kind, run in runs.items()},
        "validation": {kind: run["validation"] for kind, run in runs.items()},
        "gain": float(np.nanmean(weighted["gain"][-max(1, round(WINDOW * len(curve))) :])),
        **reached,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return medians over the seeds as a table in Markdown."""
    lines = [
        "| pipeline | steps | seeds | training loss, uniform → weighted | validation, uniform → weighted | gain "
        "| updates to uniform's loss | time to uniform's loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["pipeline"] for row in rows):
        of = [row for row in rows if row["pipeline"] == name]
        loss = [statistics.median(row["loss"][kind] for row in of) for kind in ("uniform", "weighted")]
        reached = [never(statistics.median(float(row[what] or "inf") for row in of)) for what in ("updates", "seconds")]
        lines.append(
            f"| `{name}` | {of[0]['steps']:,} | {len(of)} | {loss[0]:.3g} → {loss[1]:.3g} | {validation(of)} "
            f"| {statistics.median(row['gain'] for row in of):.3g} | {' | '.join(reached)} |"
        )
    return "\n".join(lines)


def validation(rows: list[dict[str, Any]]) -> str:
    """Return the median validation errors, or losses where there are no classes."""
    of = {
        kind: [row["validation"][kind] for row in rows if row["validation"][kind]] for kind in ("uniform", "weighted")
    }
    if not all(of.values()):
        return "–"
    what = "loss" if any(np.isnan(values["error"]) for values in of["uniform"]) else "error"
    middle = [statistics.median(values[what] for values in of[kind]) for kind in of]
    return " → ".join(f"{value:.2%}" if what == "error" else f"{value:.4g} (loss)" for value in middle)


def never(share: float) -> str:
    return f"{share:.2f}" if np.isfinite(share) else "not reached"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", metavar="NAME", help="default: all but svhn, which is downloaded")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    names = options.pipelines or [name for name in PIPELINES if name != "svhn"]
    if unknown := set(names) - set(PIPELINES):
        parser.error(f"got {', '.join(unknown)}, wanted some of {', '.join(PIPELINES)}")
    rows = [json.loads(line) for line in options.to.read_text().splitlines()] if options.to.exists() else []
    for seed in range(0 if options.table else options.seeds):
        for name in names:
            if any((row["pipeline"], row["seed"]) == (name, seed) for row in rows):
                continue
            kinds = ((), ("--uniform",)) if seed % 2 else (("--uniform",), ())  # neither is always the first
            runs = {kind: train(name, seed, options.data, options.steps, *kind) for kind in kinds}
            rows.append(pair(name, seed, runs["--uniform",], runs[()]))
            options.to.parent.mkdir(exist_ok=True)
            with options.to.open("a") as file:
                print(json.dumps(rows[-1]), file=file)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
