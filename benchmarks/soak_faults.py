"""What happens to the run of ``soak.py``: a function per fault, which returns once the run has recovered.

Each returns what became of it, with ``back``, the seconds until the run had recovered; None if there was nothing to
disturb, because the last fault has not been mended yet. ``start`` is the step from which the learner's successor
resumed, ``kept`` the latest checkpoint when the fault began, and ``heard`` the latest step that was reported; if the
learner had time to commit (``in order``), nothing that was reported may be lost.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from distributed import Client
from soak_run import BACK, SoakRun

import dask_isgd as isgd
from dask_isgd.errors import StorageFullError

Outcome = dict[str, Any] | None


def kill_learner(soak: SoakRun) -> Outcome:
    """Kill the learner's process; its nanny starts another one."""
    before = _Before(soak)
    return before.recovery() if _send(soak.pid("learner"), signal.SIGKILL) else None


def kill_coordinator(soak: SoakRun) -> Outcome:
    """Kill the coordinator's process, until a successor's scores are reported."""
    former = soak.incarnation("coordinator")
    if not _send(soak.pid("coordinator"), signal.SIGKILL):
        return None
    back = soak.until(lambda latest: soak.incarnation("coordinator") > former)
    scored = soak.run.latest.get("examples_scored", 0)
    return {"back": back + soak.until(lambda latest: 0 < latest.get("examples_scored", 0) != scored)}


def kill_scorer(soak: SoakRun) -> Outcome:
    """Kill a scorer's process, until there are as many scorers as before."""
    there = soak.scorers()
    if not _send(soak.pid("scorer"), signal.SIGKILL):
        return None
    return {"back": soak.until(lambda latest: len(soak.scorers() - there) > 0 and len(soak.scorers()) >= len(there))}


def terminate_worker(soak: SoakRun) -> Outcome:
    """End the learner's worker in order (SIGTERM), and start another one."""
    before = _Before(soak)
    soak.learner.terminate()
    soak.learner = soak.cluster.worker("learner=1", threads=2)
    return before.recovery(in_order=True)


def stop_process(soak: SoakRun, role: str) -> Outcome:
    """Stop a process (SIGSTOP) until it has been replaced; then let it continue, if it still exists."""
    before, pid, there = _Before(soak), soak.pid(role), soak.scorers()
    if not _send(pid, signal.SIGSTOP):
        return None
    try:
        if role == "learner":
            return before.recovery()
        former = soak.incarnation("coordinator")
        coordinates = soak.pid("coordinator") == pid
        back = soak.until(lambda latest: len(soak.scorers() - there) > 0 and len(soak.scorers()) >= len(there))
        if coordinates:
            back += soak.until(lambda latest: soak.incarnation("coordinator") > former)
        return {"back": back}
    finally:
        _send(pid, signal.SIGCONT)


def hold_process(soak: SoakRun) -> Outcome:
    """Stop the learner's process for a moment, too short for its cluster to notice."""
    pid = soak.pid("learner")
    if not _send(pid, signal.SIGSTOP):
        return None
    time.sleep(soak.chance.uniform(1.0, 3.0))
    _send(pid, signal.SIGCONT)
    return {"back": soak.until_step()}


def pause(soak: SoakRun) -> Outcome:
    """Pause the run and continue."""
    return _paused(soak, soak.run)


def attach(soak: SoakRun) -> Outcome:
    """Attach with another client, which pauses the run, continues and goes."""
    with Client(scheduler_file=str(soak.cluster.scheduler_file), timeout=BACK, set_as_default=False) as client:
        return _paused(soak, isgd.attach(client, soak.run_dir))


def _paused(soak: SoakRun, run: isgd.Run) -> Outcome:
    heard = soak.run.latest["step"]
    run.pause()
    soak.until(lambda latest: soak.run.status == "paused" and soak.committed() >= heard)
    run.unpause()
    return {"back": soak.until_step()}


def take_over(soak: SoakRun) -> Outcome:
    """Resume the run while it still trains."""
    before = _Before(soak)
    soak.resume()
    return before.recovery(in_order=True)


def lose_client(soak: SoakRun) -> Outcome:
    """Let another client take over the run and own it; kill this client, and resume the run that ends with it."""
    before = _Before(soak)
    client = soak.another_client()
    try:
        soak.attach()
        taken = before.recovery(in_order=True)
        before = _Before(soak)
    finally:
        client.kill()
        client.wait(BACK)
    began = time.monotonic()
    soak.until_ended()
    ended = time.monotonic() - began
    soak.resume()
    outcome = before.recovery(in_order=True)
    return {**outcome, "back": ended + outcome["back"], "taken over": taken}


def fill_disk(soak: SoakRun) -> Outcome:
    """Fill the disk until the run fails with StorageFullError; make room and resume."""
    assert soak.disk is not None
    before, filler = _Before(soak), soak.disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        soak.run.wait(timeout=BACK)
    except StorageFullError:
        pass
    else:
        raise AssertionError(f"the disk is full, and the run: {soak.run.status}, {soak.run.latest}")
    finally:
        filler.unlink()
    soak.resume()
    return before.recovery()


FAULTS: dict[str, Callable[[SoakRun], Outcome]] = {
    "learner killed": kill_learner,
    "coordinator killed": kill_coordinator,
    "scorer killed": kill_scorer,
    "worker terminated": terminate_worker,
    "learner stopped": partial(stop_process, role="learner"),
    "scorer stopped": partial(stop_process, role="scorer"),
    "learner held up": hold_process,
    "paused": pause,
    "attached": attach,
    "taken over": take_over,
    "client lost": lose_client,
    "disk full": fill_disk,
}


class _Before:
    """What was committed and heard of the run before a fault."""

    def __init__(self, soak: SoakRun) -> None:
        self.soak = soak
        self.heard, self.former, self.kept = soak.run.latest["step"], soak.incarnation(), soak.committed()

    def recovery(self, *, in_order: bool = False) -> dict[str, Any]:
        """Wait for the first report of a successor of the learner; return what it lost."""
        soak, former = self.soak, self.former
        back = soak.until(lambda latest: latest.get("incarnation", 0) > former and soak.orders[-1][0] > former)
        start = max(soak.start_of(incarnation) for incarnation in range(former + 1, soak.incarnation() + 1))
        needed = max(self.kept, self.heard if in_order else 0)
        return {"back": back, "lost": max(0, self.heard - start), "beyond": start < needed, "in order": in_order}


def _send(pid: int | None, number: signal.Signals) -> bool:
    """Send a signal; return whether the process existed: one killed a moment ago may have no successor yet."""
    if not pid:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
