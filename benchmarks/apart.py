"""A cluster of ``dask scheduler`` and ``dask worker`` processes, as a user starts them on machines."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distributed import Client

_DASK = [sys.executable, "-m", "dask"]
_LOCAL = ["--host", "127.0.0.1", "--no-dashboard"]
_SECONDS = 60.0
_PATH = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
"""So that a worker finds the functions of these scripts by name."""


class Apart(ExitStack):
    """A scheduler, and the workers that are added; all of them end with it. Their logs are in ``folder``."""

    def __init__(self, folder: Path, **environment: str) -> None:
        super().__init__()
        self.folder, self.environment = folder, environment
        self.scheduler_file, self._started = folder / "scheduler.json", 0
        self.scheduler = self._start("scheduler", "--port", "0")

    def worker(self, resources: str, *options: str, threads: int = 1) -> subprocess.Popen[bytes]:
        """Start a worker below a nanny, with ``resources`` such as ``"scorer=1"``; return the nanny."""
        place = ("--local-directory", str(self.folder), "--memory-limit", "0")
        return self._start("worker", "--resources", resources, "--nthreads", str(threads), *place, *options)

    def client(self, **options: Any) -> Client:
        """Return a new client, closed at the end."""
        return self.enter_context(Client(scheduler_file=str(self.scheduler_file), timeout=_SECONDS, **options))

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{kind}-{self._started}.log").open("wb") as log:
            process = subprocess.Popen(
                [*_DASK, kind, "--scheduler-file", str(self.scheduler_file), *_LOCAL, *options],
                env={**os.environ, "PYTHONPATH": _PATH, **self.environment},
                stdout=log,
                stderr=log,
            )
        self._started += 1
        self.callback(_end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
