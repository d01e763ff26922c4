"""A run under random faults: killed, stopped and terminated processes, clients that come, go and die, a full disk.

    python benchmarks/soak.py                # ten minutes, into results/soak.json
    python benchmarks/soak.py --seconds 60 --to soak.json
    python benchmarks/soak.py --tiny         # what the tests run: three faults, once each

The faults are those of ``soak_faults.py``, in shuffled order and at random moments from a seed, each after the run has
recovered from the last one and made a step. The run is on a cluster of processes started apart, with a run directory
on a small disk of its own; without the right to mount one (root), the disk is never full. The tally has the number of
faults by kind; for each the seconds until the run had recovered (the learner: until its successor reported a step; the
coordinator: until a successor's scores were reported; a scorer: until the scheduler had as many as before), and for the
learner the steps that were trained twice. The script fails unless:

* no successor starts before the latest checkpoint at the time of the fault, nor before the latest reported step if the
  learner had time to commit (``lost beyond the promise``), and each recovery takes less than a minute;
* the history has each report once (``double rows``, ``gaps``);
* no older incarnation or version is received after a newer one (``older received``);
* every weight is finite, every checkpoint verifies, and 200,000 draws from the weights on disk have the
  frequencies that follow from them (chi-square over the chunks, p above 1e-4).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from soak_faults import FAULTS
from soak_run import BACK, CHECKPOINT_SECONDS, REPORT_EVERY, SAMPLING, SoakRun

from dask_isgd.errors import CheckpointError
from dask_isgd.sampling import ImportanceSampler
from dask_isgd.storage import WeightArray

RESULT = Path(__file__).parent / "results" / "soak.json"
PROMISE = 60.0
"""Seconds that a recovery may take."""
_TINY = ("learner killed", "coordinator killed", "scorer killed")
_MUST_BE_ZERO = (
    *("lost beyond the promise", "recoveries over a minute", "double rows", "gaps", "older received"),
    *("weights not finite", "checkpoints that do not verify"),
)
_DRAWS = 200_000
_MIN_P = 1e-4


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=2.0, help="mean seconds from a recovery to the next fault")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds of silence after which a worker is dead")
    parser.add_argument("--scorers", type=int, default=2)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--to", type=Path, default=RESULT, help="file for the tally, as JSON")
    parser.add_argument("--folder", type=Path, help="where to keep the run and the logs of its cluster")
    parser.add_argument("--tiny", action="store_true", help="three faults, write nothing: a test that it runs")
    options = parser.parse_args(arguments)
    names, seconds = (_TINY, 0.0) if options.tiny else (options.faults, options.seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        soak = SoakRun(folder, options.scorers, random.Random(options.seed), options.patience)
        try:
            faults = disturb(soak, names, seconds, options.every)
            tally = tally_of(soak, faults, options.seed)
        finally:
            soak.close()
    settings = {name: getattr(options, name) for name in ("seconds", "seed", "every", "patience", "scorers")}
    result = {"settings": settings, "machine": f"{platform.machine()}, {os.cpu_count()} cores", **tally}
    for name, value in tally.items():
        if name != "each fault":
            print(f"{name:<44}{value}")
    if not options.tiny:
        options.to.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {options.to}")
    broken = [name for name in _MUST_BE_ZERO if tally[name]]
    broken += ["frequencies, p"] if tally["frequencies, p"] <= _MIN_P else []
    if broken:
        sys.exit(f"requirements not met: {', '.join(broken)}")
    return result


def disturb(soak: SoakRun, names: Iterable[str], seconds: float, every: float) -> list[dict[str, Any]]:
    """Cause one fault after the other for ``seconds``, each at least once; return what became of them."""
    names = [name for name in names if name != "disk full" or soak.disk is not None]
    end, waiting, done = time.monotonic() + seconds, list[str](), list[dict[str, Any]]()
    while time.monotonic() < end or len(done) < len(names):
        soak.until_step()
        soak.let_pass(soak.chance.expovariate(1 / every) if seconds else 0.5)
        waiting = waiting or soak.chance.sample(names, len(names))
        outcome = FAULTS[waiting[-1]](soak)
        if outcome is not None:
            done.append({"fault": waiting.pop(), **outcome})
            print(json.dumps(done[-1]), flush=True)
    return done


def tally_of(soak: SoakRun, faults: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Stop the run and return the tally."""
    directory = soak.run.directory
    assert soak.run.stop(timeout=BACK) == "stopped"
    weights = WeightArray.open(directory.weights)
    values = weights.read_all()
    jumps = np.diff(soak.run.history.step.values)
    checkpoints = directory.checkpoints()
    starts = [each for fault in faults for each in (fault, fault.get("taken over", {})) if "lost" in each]
    killed = [fault["lost"] for fault in faults if fault["fault"] == "learner killed"]
    rate = float(np.median(soak.run.history.steps_per_second.values))
    back = {
        name: [round(each["back"], 1) for each in faults if each["fault"] == name]
        for name in FAULTS
        if any(each["fault"] == name for each in faults)
    }
    return {
        "faults": len(faults),
        **{f"{name}: number; s to recover: median, max": _spread(seconds) for name, seconds in back.items()},
        "incarnations of the learner": soak.incarnation(),
        "incarnations of the coordinator": soak.incarnation("coordinator"),
        "steps": soak.committed(),
        "steps per second, median": round(rate, 1),
        "steps lost per learner killed: median, max": [statistics.median(killed or [0]), max(killed, default=0)],
        "steps between two checkpoints, about": round(rate * CHECKPOINT_SECONDS),
        "lost beyond the promise": sum(each["beyond"] for each in starts),
        "recoveries over a minute": sum(fault["back"] > PROMISE for fault in faults),
        "double rows": int((jumps <= 0).sum()),
        "gaps": int((jumps > REPORT_EVERY).sum()),
        "older received": soak.older_received(),
        "events received": len(soak.orders) + len(soak.published),
        "weights not finite": int((~np.isfinite(values)).sum()),
        "checkpoints that do not verify": sum(not _verifies(checkpoints, name) for name in checkpoints.names()),
        "frequencies, p": round(frequencies(weights, np.nan_to_num(values), seed), 4),
        "each fault": faults,
    }


def _spread(seconds: list[float]) -> list[float]:
    return [len(seconds), round(statistics.median(seconds), 1), max(seconds)]


def _verifies(checkpoints: Any, name: str) -> bool:
    try:
        checkpoints.load(name)
    except CheckpointError:
        return False
    return True


def frequencies(weights: WeightArray, values: np.ndarray, seed: int) -> float:
    """Return the p-value of the draws' frequencies over chunks, given the weights on disk."""
    sampler = ImportanceSampler(weights.n, weights.chunk_size, SAMPLING)
    for chunk in range(weights.n_chunks):
        sampler.update(chunk, values[slice(*weights.bounds(chunk))], 0)
    sampler.refresh(0)
    draw = sampler.draw(_DRAWS, np.random.default_rng(seed))
    q = sampler.probabilities(np.arange(weights.n)).reshape(-1)
    chunk_of = np.arange(weights.n) // weights.chunk_size
    expected = np.bincount(chunk_of, weights=q) * _DRAWS
    seen = np.bincount(chunk_of[draw.indices], minlength=weights.n_chunks)
    return float(stats.chisquare(seen, expected * (seen.sum() / expected.sum())).pvalue)


if __name__ == "__main__":
    main()
