"""The run that ``soak.py`` disturbs: its cluster of processes, its disk, and what has been heard of it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import zarr
from apart import Apart

import dask_isgd as isgd
from dask_isgd.errors import WaitTimeoutError
from dask_isgd.events import Progress, Published, topic_of
from dask_isgd.pipelines import PIPELINES
from dask_isgd.runtime import pubsub
from dask_isgd.storage import Dataset

MODEL = "dask_isgd.pipelines.models:digits"
SAMPLING = isgd.Sampling(gate="open", scheme="independent")
CHECKPOINT_SECONDS = 2.0
REPORT_EVERY = 10
BACK = 300.0
"""Seconds after which the script fails if a role is not back."""
_DISK = "128m"
_LEARNING = isgd.Learning(
    steps=10**7, batch_size=32, publish_every=20, report_every=REPORT_EVERY, threads=1,
    checkpoint_seconds=CHECKPOINT_SECONDS,
)  # fmt: skip


def start(client: Any, data: Dataset | str, run_dir: Path | str, **options: Any) -> isgd.Run:
    """Start or resume the run."""
    found = data if isinstance(data, Dataset) else Dataset(data, group="train")
    return isgd.fit(client, MODEL, found, run_dir, learning=_LEARNING, sampling=SAMPLING, **options)


class SoakRun:
    """A detached run on a scheduler, a learner's worker and scorers, with the run directory on a small disk of its own.

    ``chance`` makes every choice. Without the right to mount a file system, ``disk`` is None. A worker that is silent
    for ``patience`` seconds is replaced.
    """

    def __init__(self, folder: Path, scorers: int, chance: Random, patience: float) -> None:
        self.chance = chance
        with ExitStack() as self.parts:
            self._begin(folder, scorers, patience)
            self.parts = self.parts.pop_all()

    def _begin(self, folder: Path, scorers: int, patience: float) -> None:
        self.disk = self._mount(folder / "disk")
        self.run_dir = (self.disk or folder) / "run"
        self.orders: list[tuple[int, int]] = []
        """(incarnation, step) of all progress received from learners, in order of receipt."""
        self.published: list[tuple[int, int]] = []
        self.data = Dataset(PIPELINES["digits"].prepare(str(folder / "digits.zarr")), group="train")
        self.cluster = self.parts.enter_context(Apart(folder, DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL=f"{patience:g}s"))
        self.learner = self.cluster.worker("learner=1", threads=2)
        for _ in range(scorers):
            self.cluster.worker("scorer=1")
        self.client = self.cluster.client()
        self.client.wait_for_workers(scorers + 1, timeout=BACK)
        self.run = start(self.client, self.data, self.run_dir, detach=True)
        self.events = pubsub.subscribe(self.client, topic_of(self.run.id))
        self.parts.callback(self.events.close)
        self.until(lambda latest: latest["step"] > 20)

    def _mount(self, place: Path) -> Path | None:
        place.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={_DISK}", "isgd-soak", str(place)]
        if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
            return None
        self.parts.callback(subprocess.run, ["umount", str(place)], check=False)
        return place

    def resume(self) -> None:
        """Resume the run from this client."""
        self.run = start(self.client, self.data, self.run_dir, resume=True, detach=True)

    def attach(self) -> None:
        """Watch the run as a client does that has not started it."""
        self.run = isgd.attach(self.client, self.run_dir)

    def another_client(self) -> subprocess.Popen[bytes]:
        """Start a process that resumes the run, owns it and waits for it."""
        arguments = [str(self.cluster.scheduler_file), str(self.data.url).removesuffix("/train"), str(self.run_dir)]
        return subprocess.Popen([sys.executable, str(Path(__file__)), *arguments])

    def close(self) -> None:
        self.parts.close()

    # What is known of the run ---------------------------------------------------------------

    def pid(self, role: str) -> int | None:
        """Return the process of the worker that runs the learner, the coordinator, or one of the scorers."""
        if role == "scorer":
            there = sorted(self.scorers())
            address = self.chance.choice(there) if there else ""
            return self.client.run(os.getpid, workers=[address], on_error="ignore").get(address) if there else None
        leases = self.run.directory.leases(role)
        return leases.owner(leases.highest()).get("pid")

    def scorers(self) -> set[str]:
        """Return the addresses of the scorers that are on the cluster."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].items()
        return {address for address, worker in workers if "scorer" in (worker.get("resources") or {})}

    def incarnation(self, role: str = "learner") -> int:
        """Return the highest incarnation of a role."""
        return self.run.directory.leases(role).highest()

    def committed(self) -> int:
        """Return the step of the latest checkpoint."""
        found = self.run.directory.checkpoints().latest()
        return found.step if found is not None else 0

    def start_of(self, incarnation: int) -> int:
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

    def until_step(self) -> float:
        """Follow the run until it has made another step; return the seconds this took."""
        before = self.run.latest["step"]
        return self.until(lambda latest: latest["step"] > before)

    def until_ended(self) -> None:
        """Follow the run until it has ended."""
        for _ in self.run.watch(BACK):
            self._receive()

    def let_pass(self, seconds: float) -> None:
        """Follow the run for some seconds."""
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

    def older_received(self) -> int:
        """Return how often an older incarnation or version was received after a newer one."""
        self._receive()
        versions = sum(later < earlier for earlier, later in itertools.pairwise(self.published))
        return versions + sum(later[0] < earlier[0] for earlier, later in itertools.pairwise(self.orders))


def main(scheduler_file: str, data: str, run_dir: str) -> None:
    """Be the other client: resume the run, own it and wait for it."""
    from distributed import Client

    with Client(scheduler_file=scheduler_file) as client, suppress(isgd.errors.LeaseLostError):
        start(client, data, run_dir, resume=True).wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
