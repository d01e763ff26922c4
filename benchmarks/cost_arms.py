"""What ``cost.py`` compares: a plain process, and the learner or the scorers of a run. One works while the other is
stopped or waits."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from cost_problems import Problem
from cost_processes import Cores, Usage, pin, pinned, send, usage
from distributed import Client
from numpy.typing import NDArray

import dask_isgd as isgd
from dask_isgd.storage import Dataset, write_dataset

PLAIN = Path(__file__).with_name("plain.py")
Array = NDArray[np.generic]
_READY = 180.0
"""Seconds within which a run must have begun to train, must have scored everything, and must have ended."""


@dataclass(frozen=True)
class Measure:
    """One window of one arm."""

    per_second: float
    """Steps, or examples scored."""
    per_cpu_second: float
    """The same per second of CPU time of the process, which other programs on the machine disturb less."""
    page_faults: float
    """Per step, or per batch scored."""
    system_share: float
    """The kernel's share of CPU time."""


class Plain:
    """A process of ``plain.py`` that waits between its windows; ``cores``: which it may use, None: all."""

    def __init__(self, problem: Problem, work: str, threads: int, cores: Cores, *, rows: int) -> None:
        command = [sys.executable, str(PLAIN), problem.name, "--work", work, "--threads", str(threads), "--serve"]
        with pinned(cores):
            self._process = subprocess.Popen(
                [*command, "--rows", str(rows)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def __enter__(self) -> Self:
        self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # the end of its input ends it

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{PLAIN.name} ended with status {self._process.wait()}; its own error is above")
        return line

    def start(self, warm: float, seconds: float) -> None:
        """Begin a window."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{warm} {seconds}\n")
        self._process.stdin.flush()

    def result(self) -> Measure:
        """Return the window that was begun last, as soon as it is over."""
        return Measure(**json.loads(self._line()))


def write(problem: Problem, rows: int, folder: Path, unit: int) -> Dataset:
    """Write examples of a problem as Zarr, ``unit`` of them per chunk."""
    x, y = problem.arrays(rows)
    url = str(folder / "data.zarr")
    write_dataset(url, "train", {"x": x, "y": y}, inputs="x", target="y", chunk_size=unit, classes=10)
    return Dataset(url, group="train")


@dataclass(frozen=True)
class Window:
    """A time for which a run was observed, in seconds of ``time.monotonic`` and of ``time.time``."""

    clock: tuple[float, float]
    time: tuple[float, float]
    learner: Usage
    scorers: Usage


class Running:
    """A run whose workers are stopped (SIGSTOP) between windows, so that they take nothing from the other arm.

    ``cores``: those of the learner's process, None: all. The rates are read from the history and from Dask's record
    of tasks once the run has ended.
    """

    def __init__(
        self,
        client: Client,
        problem: Problem,
        data: Dataset,
        folder: Path,
        cores: Cores,
        *,
        learning: isgd.Learning,
        sampling: isgd.Sampling,
        scoring: isgd.Scoring,
    ) -> None:
        self._client, self._problem = client, problem
        self._windows: list[Window] = []
        client.get_task_stream(count=1)  # Dask records tasks from the first request on
        self._run = isgd.fit(client, problem.model, data, folder, learning=learning, sampling=sampling, scoring=scoring)
        self._report_every = learning.report_every
        self._began = math.inf
        self._await(lambda latest: latest["step"] > 0)
        pids = client.run(os.getpid)
        learner = self._learner_address()
        if cores is not None:
            client.run(pin, cores, workers=[learner])
        self._learner = pids.pop(learner)
        self._scorers = list(pids.values())
        self._await(lambda latest: sampling.uniform or latest.get("scored_fraction") == 1)
        self._send(signal.SIGSTOP)

    def _await(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        for latest in self._run.watch(timeout=_READY):
            if "seconds" in latest:  # the history counts them from a moment of its own
                self._began = min(self._began, time.monotonic() - latest["seconds"])
            if condition(latest):
                return
        self._run.wait()  # raises the error that ended the run
        raise RuntimeError(f"the run ended too soon: {self._run.status}")

    def _learner_address(self) -> str:
        tasks, name = self._client.processing(), f"learn-{self._run.id}"
        return next(address for address, keys in tasks.items() if any(name in str(key) for key in keys))

    def _send(self, number: signal.Signals) -> None:
        send([self._learner, *self._scorers], number)

    def _usage(self) -> tuple[Usage, Usage]:
        return usage([self._learner]), usage(self._scorers)

    def window(self, warm: float, seconds: float) -> float:
        """Let the run work for ``warm`` and ``seconds``, each longer if its learner is too slow to report three times.

        Return the seconds without ``warm``.
        """
        step = self._run.latest["step"]
        self._send(signal.SIGCONT)
        time.sleep(warm)
        self._await(lambda latest: latest["step"] - step >= 3 * self._report_every)
        began, before, step = (time.monotonic(), time.time()), self._usage(), self._run.latest["step"]
        self._await(
            lambda latest: (
                (waited := time.monotonic() - began[0]) >= seconds
                and (latest["step"] - step >= 3 * self._report_every or waited > 10 * seconds)
            )
        )
        ended, after = (time.monotonic(), time.time()), self._usage()
        self._send(signal.SIGSTOP)
        learner, scorers = (b - a for a, b in zip(before, after, strict=True))
        self._windows.append(Window((began[0], ended[0]), (began[1], ended[1]), learner, scorers))
        return ended[0] - began[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGCONT)  # whatever happened: a stopped worker does not end

    def end(self) -> None:
        """End the run, so that its history is complete."""
        self._send(signal.SIGCONT)
        self._run.stop(timeout=_READY)
        self._history = self._run.history
        self._tasks = self._client.get_task_stream(start=self._windows[0].time[0]) if self._windows else ()

    @property
    def threads(self) -> int:
        """torch threads of the learner in its last report."""
        return int(self._history["threads"][-1])

    def learned(self) -> list[Measure]:
        """Return steps per second, window by window."""
        steps = self._history["step"].to_numpy()
        clock = self._history["seconds"].to_numpy() + self._began
        return [measure(rate(clock, steps, w.clock, "reports"), w.clock, w.learner) for w in self._windows]

    def scored(self) -> list[Measure]:
        """Return examples scored per second by all scorers, window by window, their waiting included."""
        chunk, batch = int(self._run.document["chunk"]), self._problem.scoring_batch
        stops = sorted(
            part["stop"]
            for task in self._tasks
            if f"score-{self._run.id}" in str(task["key"])
            for part in task["startstops"]
            if part["action"] == "compute"
        )
        scored = chunk * np.arange(len(stops))
        rates = [rate(np.array(stops), scored, w.time, "scoring tasks") for w in self._windows]
        pairs = zip(rates, self._windows, strict=True)
        return [measure(found, w.clock, w.scorers, batch) for found, w in pairs]


def rate(clock: Array, done: Array, window: tuple[float, float], what: str) -> float:
    """Return the increase of ``done`` per second from the first to the last moment of ``clock`` inside a window."""
    inside = np.flatnonzero((clock >= window[0]) & (clock <= window[1]))
    if len(inside) < 2:
        raise RuntimeError(
            f"got {len(inside)} {what} in {window[1] - window[0]:.1f} s, wanted at least 2; raise --seconds"
        )
    first, last = inside[0], inside[-1]
    return float((done[last] - done[first]) / (clock[last] - clock[first]))


def measure(rate: float, window: tuple[float, float], used: Usage, unit: int = 1) -> Measure:
    """Return a measure with page faults per ``unit``."""
    done = rate * (window[1] - window[0])
    per_cpu_second = done / used.cpu if used.cpu else math.nan
    return Measure(rate, per_cpu_second, used.page_faults * unit / done, used.system_share)
