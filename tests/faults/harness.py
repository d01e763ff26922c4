"""Clusters whose processes can be killed, and runs that are waited for by what they say."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

import dask_isgd as isgd
from dask_isgd.storage import Dataset

WAIT = 120
"""Seconds until a test gives up; recovery itself is a matter of a few."""
MODEL = "dask_isgd.pipelines.models:digits"
OPEN = isgd.Sampling(gate="open")
CLOCKS = {"seconds", "steps_per_second"}
_ROOT = str(Path(isgd.__file__).absolute().parents[1])


def learning(**changes: Any) -> isgd.Learning:
    """A run that continues until it is stopped, with checkpoints every 50 steps."""
    settings = {"steps": 10**7, "batch_size": 32, "publish_every": 20, "report_every": 10, "evaluate_every": 10**9}
    return isgd.Learning(**{**settings, "threads": 1, "checkpoint_steps": 50, **changes})


def fit(client: Client, data: Dataset, run_dir: Path | str, **changes: Any) -> isgd.Run:
    """Start a run on the digits; ``learning`` and all other arguments of ``dask_isgd.fit`` may be changed."""
    settings = {"learning": learning(), "sampling": OPEN, **changes}
    return isgd.fit(client, MODEL, data, run_dir, **settings)


def until(run: isgd.Run, condition: Callable[[dict[str, Any]], Any], timeout: float = WAIT) -> float:
    """Follow a run until the condition holds of what is heard of it; the seconds that took."""
    began = time.monotonic()
    assert any(condition(latest) for latest in run.watch(timeout)), f"the run ended before: {run.status}, {run.latest}"
    return time.monotonic() - began


def reaches(step: int, incarnation: int = 1) -> Callable[[dict[str, Any]], bool]:
    """The learner has reported a step, and is this incarnation or a younger one."""
    return lambda latest: latest["step"] >= step and latest.get("incarnation", 0) >= incarnation


def committed(run: isgd.Run) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    found = run.directory.checkpoints().latest()
    return found.step if found is not None else 0


def saved(run: isgd.Run) -> Callable[[dict[str, Any]], bool]:
    """There is a checkpoint: it is committed beside the loop, some steps after the one it is of."""
    return lambda latest: committed(run) > 0


def lowest_step(run: isgd.Run, incarnation: int) -> int:
    """The step an incarnation of the learner went on from."""
    import zarr

    group = zarr.open_group(run.directory.history, path=f"learner-{incarnation:04d}", mode="r")
    return int(group.attrs["start_step"])


def trained(run: isgd.Run, incarnation: int) -> int:
    """The last step an incarnation reported; 0 if it never did."""
    import zarr

    reports = zarr.open_array(run.directory.history, path=f"learner-{incarnation:04d}/reports", mode="r")
    return int(np.nanmax(reports[:1024, -1], initial=0))


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, how)


def holder(run: isgd.Run, role: str = "learner") -> dict[str, Any]:
    """Who runs a long task: its address and process."""
    leases = run.directory.leases(role)
    return leases.owner(leases.highest())


def state(run: isgd.Run) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the newest checkpoint and of the history, clocks left out."""

    def digest(array: np.ndarray) -> str:
        return hashlib.sha256(array.tobytes()).hexdigest()[:16]

    found = run.directory.checkpoints().latest()
    assert found is not None
    history = run.history.load()
    return (
        {name: digest(array) for name, array in found.tensors.items()},
        {name: digest(history[name].values) for name in history.data_vars if name not in CLOCKS},
    )


def no_gaps(run: isgd.Run) -> None:
    """The history holds each report once, in order."""
    steps = run.history.step.values
    assert (np.diff(steps) == 10).all(), steps


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is gone afterwards, and its children with it."""
    started = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, str(Path(__file__).parent)]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait(WAIT)
        assert started.stdout is not None
        started.stdout.close()


class Apart(contextlib.ExitStack):
    """A cluster of ``dask scheduler`` and ``dask worker`` processes, as on a cluster of machines."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__()
        self.file = str(folder / "scheduler.json")
        self.folder = folder
        local = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", self.file, *options)
        self.scheduler = self.enter_context(process("-m", "distributed.cli.dask_scheduler", *local))

    def worker(self, role: str, *options: str, threads: int = 1, **environment: str) -> subprocess.Popen[str]:
        arguments = ("--scheduler-file", self.file, "--nthreads", str(threads), "--resources", f"{role}=1")
        place = ("--local-directory", str(self.folder), "--host", "127.0.0.1", "--no-dashboard")
        limits = () if "--memory-limit" in options else ("--memory-limit", "0")
        return self.enter_context(
            process("-m", "distributed.cli.dask_worker", *arguments, *place, *limits, *options, **environment)
        )

    def client(self, **options: Any) -> Client:
        return self.enter_context(Client(scheduler_file=self.file, timeout=WAIT, **options))
