"""A run under random kills.

    python benchmarks/soak.py                # ten minutes, into results/soak.json
    python benchmarks/soak.py --seconds 60 --to soak.json
    python benchmarks/soak.py --tiny         # what the tests run: each role once

Learner, coordinator and scorers of a run on the digits are killed (SIGKILL) at random moments from a seed, in
shuffled order, each time after the run has recovered from the last kill and made a step. The tally counts kills by
role; for every kill the seconds until its role was back (the learner: until its successor reported a step; the
coordinator: until a successor's scores were reported; a scorer: until the scheduler had as many as before), and
for the learner the steps that were trained twice. The script fails unless:

* no successor starts before the latest checkpoint at the time of the kill (``lost beyond the promise``);
* the history has each report once (``double rows``, ``gaps``);
* no older incarnation or version is received after a newer one (``older received``);
* every weight is finite, every checkpoint verifies, and 200,000 draws from the weights on disk have the
  frequencies that follow from them (chi-square over the chunks, p above 1e-4).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client
from scipy import stats

import dask_isgd as isgd
from dask_isgd.errors import WaitTimeoutError
from dask_isgd.events import Progress, Published, topic_of
from dask_isgd.pipelines import PIPELINES
from dask_isgd.runtime import pubsub
from dask_isgd.sampling import ImportanceSampler
from dask_isgd.storage import Dataset, WeightArray

MODEL = "dask_isgd.pipelines.models:digits"
SAMPLING = isgd.Sampling(gate="open", scheme="independent")
ROLES = ("learner", "scorer", "coordinator")
RESULT = Path(__file__).parent / "results" / "soak.json"
CHECKPOINT_SECONDS = 2.0
REPORT_EVERY = 10
BACK = 300.0
"""Seconds after which the script fails if a role is not back."""
_DRAWS = 200_000
_MIN_P = 1e-4


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds from a recovery to the next kill")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--to", type=Path, default=RESULT, help="file for the tally, as JSON")
    parser.add_argument("--tiny", action="store_true", help="kill each role once, write nothing: a test that it runs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.workers, random.Random(options.seed))
        try:
            soak.kill_for(0.0 if options.tiny else options.seconds, options.every)
            tally = soak.tally(options.seed)
        finally:
            soak.close()
    settings = {"seconds": options.seconds, "seed": options.seed, "every": options.every, "workers": options.workers}
    result = {"settings": settings, "machine": f"{platform.machine()}, {os.cpu_count()} cores", **tally}
    for name, value in tally.items():
        if name != "each kill":
            print(f"{name:<44}{value}")
    if not options.tiny:
        options.to.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {options.to}")
    broken = [name for name in ("lost beyond the promise", "double rows", "gaps", "older received") if tally[name]]
    broken += [name for name in ("weights not finite", "checkpoints that do not verify") if tally[name]]
    broken += ["frequencies, p"] if tally["frequencies, p"] <= _MIN_P else []
    if broken:
        sys.exit(f"requirements not met: {', '.join(broken)}")
    return result


class Soak:
    """A run, and the killing of its processes."""

    def __init__(self, folder: Path, workers: int, chance: random.Random) -> None:
        self.chance = chance
        self.kills: list[dict[str, Any]] = []
        self.orders: list[tuple[int, int]] = []
        """(incarnation, step) of all progress received from learners, in order of receipt."""
        self.published: list[tuple[int, int]] = []
        data = Dataset(PIPELINES["digits"].prepare(str(folder / "digits.zarr")), group="train")
        learning = isgd.Learning(
            steps=10**7, batch_size=32, publish_every=20, report_every=REPORT_EVERY, threads=1,
            checkpoint_seconds=CHECKPOINT_SECONDS,
        )  # fmt: skip
        self.cluster = isgd.LocalCluster(workers)
        self.client: Client = self.cluster.get_client()
        self.run = isgd.fit(self.client, MODEL, data, folder / "run", learning=learning, sampling=SAMPLING)
        self.events = pubsub.subscribe(self.client, topic_of(self.run.name))
        self.until(lambda latest: latest["step"] > 20)

    def kill_for(self, seconds: float, every: float) -> None:
        """Kill one role after the other for ``seconds``, every role at least once."""
        end, roles = time.monotonic() + seconds, list[str]()
        while time.monotonic() < end or len(self.kills) < len(ROLES):
            before = self.run.latest["step"]
            self.until(lambda latest, before=before: latest["step"] > before)
            self.let_pass(self.chance.expovariate(1 / every) if seconds else 0.5)
            roles = roles or self.chance.sample(ROLES, len(ROLES))
            killed = getattr(self, roles[-1])()
            if killed is not None:
                self.kills.append({"role": roles.pop(), **killed})

    # Kills ------------------------------------------------------------------------------

    def learner(self) -> dict[str, Any] | None:
        leases, step = self.run.directory.leases(), self.run.latest["step"]
        former = leases.highest()
        if not _kill(leases.owner(former).get("pid")):
            return None
        kept = self._committed()
        back = self.until(lambda latest: latest.get("incarnation", 0) > former and self.orders[-1][0] > former)
        start = max(self._start(i) for i in range(former + 1, leases.highest() + 1))
        return {"back": back, "lost": max(0, step - start), "since checkpoint": step - kept, "beyond": start < kept}

    def coordinator(self) -> dict[str, Any] | None:
        leases = self.run.directory.leases("coordinator")
        former = leases.highest()
        if not _kill(leases.owner(former).get("pid")):
            return None
        back = self.until(lambda latest: leases.highest() > former)
        scored = self.run.latest.get("examples_scored", 0)
        return {"back": back + self.until(lambda latest: 0 < latest.get("examples_scored", 0) != scored)}

    def scorer(self) -> dict[str, Any] | None:
        there = self._scorers()
        address = self.chance.choice(sorted(there)) if there else ""
        if not _kill(self.client.run(os.getpid, workers=[address], on_error="ignore").get(address) if there else None):
            return None
        return {"back": self.until(lambda latest: len(self._scorers() - {address}) >= len(there))}

    def _scorers(self) -> set[str]:
        workers = self.client.scheduler_info(n_workers=-1)["workers"].items()
        return {address for address, worker in workers if "scorer" in (worker.get("resources") or {})}

    def _committed(self) -> int:
        found = self.run.directory.checkpoints().latest()
        return found.step if found is not None else 0

    def _start(self, incarnation: int) -> int:
        """Return the step from which an incarnation resumed; 0 if it died before it began."""
        try:
            group = zarr.open_group(self.run.directory.history, path=f"learner-{incarnation:04d}", mode="r")
            return int(group.attrs["start_step"])
        except (FileNotFoundError, KeyError):
            return 0

    # Waiting ----------------------------------------------------------------------------------

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> float:
        """Follow the run until the condition holds; return the seconds this took."""
        began = time.monotonic()
        for latest in self.run.watch(BACK):
            self._receive()
            if condition(latest):
                return time.monotonic() - began
        raise AssertionError(f"the run ended: {self.run.status}, {self.run.latest}")

    def let_pass(self, seconds: float) -> None:
        try:
            for _ in self.run.watch(seconds):
                self._receive()
        except WaitTimeoutError:
            return
        raise AssertionError(f"the run ended: {self.run.status}, {self.run.latest}")

    def _receive(self) -> None:
        for event in self.events.drain():
            if isinstance(event, Progress):
                self.orders.append((event.incarnation, event.step))
            elif isinstance(event, Published):
                self.published.append((event.incarnation, event.version))

    # Tally ----------------------------------------------------------------------------------

    def tally(self, seed: int) -> dict[str, Any]:
        """Stop the run and return the tally."""
        directory = self.run.directory
        assert self.run.stop(timeout=BACK) == "stopped"
        self._receive()
        weights = WeightArray.open(directory.weights)
        values = weights.read_all()
        jumps = np.diff(self.run.history.step.values)
        checkpoints = directory.checkpoints()
        deaths = [kill for kill in self.kills if kill["role"] == "learner"]
        lost = [kill["lost"] for kill in deaths]
        rate = float(np.median(self.run.history.steps_per_second.values))
        back = {role: [round(kill["back"], 1) for kill in self.kills if kill["role"] == role] for role in ROLES}
        return {
            "kills": len(self.kills),
            **{f"kills of {role}s": len(seconds) for role, seconds in back.items()},
            **{f"{role} back, s: median, max": [round(statistics.median(s), 1), max(s)] for role, s in back.items()},
            "incarnations of the learner": directory.leases().highest(),
            "incarnations of the coordinator": directory.leases("coordinator").highest(),
            "steps": self._committed(),
            "steps per second, median": round(rate, 1),
            "steps lost per learner kill: median, max": [statistics.median(lost), max(lost)],
            "steps between two checkpoints, about": round(rate * CHECKPOINT_SECONDS),
            "lost beyond the promise": sum(kill["beyond"] for kill in deaths),
            "double rows": int((jumps <= 0).sum()),
            "gaps": int((jumps > REPORT_EVERY).sum()),
            "older received": _backwards([i for i, _ in self.orders]) + _backwards(self.published),
            "events received": len(self.orders) + len(self.published),
            "weights not finite": int((~np.isfinite(values)).sum()),
            "checkpoints that do not verify": sum(not _verifies(checkpoints, n) for n in checkpoints.names()),
            "frequencies, p": round(frequencies(weights, np.nan_to_num(values), seed), 4),
            "each kill": self.kills,
        }

    def close(self) -> None:
        self.events.close()
        self.client.close()
        self.cluster.close()


def _kill(pid: int | None) -> bool:
    """Kill a process; return whether it existed: one killed a moment ago may have no successor yet."""
    if not pid:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _verifies(checkpoints: Any, name: str) -> bool:
    try:
        checkpoints.load(name)
    except isgd.errors.CheckpointError:
        return False
    return True


def _backwards(orders: list[Any]) -> int:
    return sum(later < earlier for earlier, later in itertools.pairwise(orders))


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
