"""A run under random kills: ``python benchmarks/soak.py [--seconds 600] [--seed 0] [--every 12] [--tiny]``.

Learner, coordinator and scorers are killed (SIGKILL) at random, seeded moments of a run on the
digits, one at a time, each kill after the run has made a step since the last. The tally counts
kills, incarnations, steps lost (trained but redone) and seconds until the learner reported again;
it ends with what must hold: the history without gap or double row, every weight finite, all
checkpoints verified, and draws whose frequencies match the weights (chi-square over chunks).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import dask.config
import numpy as np
from distributed import Client
from scipy import stats

import dask_isgd as isgd
from dask_isgd.errors import WaitTimeout
from dask_isgd.pipelines import PIPELINES
from dask_isgd.sampling import ImportanceSampler
from dask_isgd.storage import Dataset, WeightArray

MODEL = "dask_isgd.pipelines.models:digits"
SAMPLING = isgd.Sampling(gate="open", draw="independent")
BACK = 300.0
_DRAWS = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=12.0, help="mean seconds between two kills")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="two kills, for the test of this script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(Path(folder), options.seconds, options.seed, options.every, options.workers, options.tiny)
    for name, value in tally.items():
        print(f"{name:<28}{value}")


def soak(folder: Path, seconds: float, seed: int, every: float, workers: int, tiny: bool = False) -> dict[str, object]:
    """Kill at random for ``seconds`` (or twice); what was counted. Raises AssertionError where a promise is broken."""
    chance = random.Random(seed)
    data = Dataset(PIPELINES["digits"].prepare(str(folder / "digits.zarr")), group="train")
    learning = isgd.Learning(
        steps=10**7, batch_size=32, publish_every=20, report_every=10, checkpoint_seconds=2.0, threads=1
    )
    kills: Counter[str] = Counter()
    recovery: list[float] = []
    redone = 0
    # a busy machine starts a process slowly: the cluster is not to give up one that its nanny restarts
    patience = dask.config.set({"distributed.deploy.lost-worker-timeout": f"{BACK:g}s"})
    with patience, isgd.LocalCluster(workers) as cluster, cluster.get_client() as client:
        run = isgd.fit(client, MODEL, data, folder / "run", learning=learning, sampling=SAMPLING)
        _until(run, lambda latest: latest["step"] > 20)
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (tiny and kills.total() >= 2):
            before = run.latest["step"]
            _until(run, lambda latest, before=before: latest["step"] > before)
            _pass(run, 0.5 if tiny else chance.expovariate(1 / every))
            role = chance.choice(("learner", "scorer", "coordinator"))
            step, incarnation = run.latest["step"], run.directory.leases().highest()
            began = time.monotonic()
            if not _kill(client, run, role, chance):
                continue
            kills[role] += 1
            if run.directory.leases().highest() > incarnation or role == "learner":
                _until(run, lambda latest, i=incarnation: latest.get("incarnation", 0) > i)
                redone += max(0, step - run.latest["step"])
                recovery.append(time.monotonic() - began)
        assert run.stop(timeout=BACK) == "stopped"
        weights = WeightArray.open(run.directory.weights)
        steps = run.history.step.values
        assert (np.diff(steps) == learning.report_every).all(), "history: a gap or a double row"
        values = weights.read_all()
        assert np.isfinite(values).all(), "a weight is not finite"
        checkpoints = run.directory.checkpoints()
        assert all(checkpoints.load(name) for name in checkpoints.names())
        p = frequencies(weights, values, seed)
        assert p > 1e-4, f"frequencies do not match the weights: p = {p:.2g}"
        return {
            "kills": dict(kills),
            "kills in all": kills.total(),
            "incarnations of the learner": run.directory.leases().highest(),
            "of the coordinator": run.directory.leases("coordinator").highest(),
            "steps": int(steps[-1]),
            "steps trained twice": redone,
            "learner back, median s": round(statistics.median(recovery), 1) if recovery else None,
            "learner back, longest s": round(max(recovery), 1) if recovery else None,
            "frequencies, p": round(p, 4),
        }


def _until(run: isgd.Run, condition) -> None:  # type: ignore[no-untyped-def]
    assert any(condition(latest) for latest in run.watch(BACK)), f"the run ended: {run.status}, {run.latest}"


def _pass(run: isgd.Run, seconds: float) -> None:
    """Let a random while go by."""
    try:
        for _ in run.watch(seconds):
            pass
    except WaitTimeout:
        return
    raise AssertionError(f"the run ended: {run.status}, {run.latest}")


def _kill(client: Client, run: isgd.Run, role: str, chance: random.Random) -> bool:
    if role == "scorer":
        scorers = [a for a, w in client.scheduler_info()["workers"].items() if "scorer" in (w.get("resources") or {})]
        if not scorers:
            return False
        address = chance.choice(sorted(scorers))
        pid = client.run(os.getpid, workers=[address], on_error="ignore").get(address)
    else:
        leases = run.directory.leases(role)
        pid = leases.owner(leases.highest()).get("pid")
    if not pid:
        return False
    try:
        os.kill(int(pid), signal.SIGKILL)
    except ProcessLookupError:  # killed a moment ago, and not yet succeeded
        return False
    return True


def frequencies(weights: WeightArray, values: np.ndarray, seed: int) -> float:
    """p-value of the draws' frequencies over chunks, given the weights that are on disk."""
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
