"""What `dask isgd train digits` takes beside its training: seconds, CPU seconds, and a timeline of all its processes.

    python benchmarks/startup.py [--repeats 3] [--steps 800] [--timeline]

Each repetition imports torch, distributed, zarr, xarray and matplotlib in a new process, then runs the command in a
folder that has its dataset. `ratio` is the command's time divided by the sum of its training and these imports. Prints
a line of JSON with the medians; `--timeline` adds, on stderr, what the command's processes did and when (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRACER = Path(__file__).parent / "timeline"
ROOT = Path(__file__).parents[1]
IMPORTS = "import torch, distributed, zarr, xarray, matplotlib"
CALLS = """
dask_isgd.pipelines.commands.train:_dataset dask_isgd.pipelines.commands.cluster:connector
dask_isgd.checks.request:prepare dask_isgd.checks.cluster:check_cluster dask_isgd.run.api:start
dask_isgd.learner.task:Learner.open dask_isgd.learner.task:Learner.work
dask_isgd.coordinator.task:Coordinator.open dask_isgd.coordinator.task:Coordinator.finish
dask_isgd.run.run:Run.wait dask_isgd.run.run:Run.summary dask_isgd.pipelines.commands.show:save_plot
distributed.deploy.spec:SpecCluster._start distributed.deploy.spec:SpecCluster._close
distributed.nanny:WorkerProcess.start distributed.nanny:WorkerProcess.kill
"""


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float, str]:
    """Run a command; return its seconds, the CPU seconds of all its processes, and what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def show_timeline(file: Path) -> None:
    """Print the lines of all processes in order, one column per process."""
    notes = sorted((line.split(" ", 3) for line in file.read_text().splitlines()), key=lambda note: float(note[0]))
    columns: dict[str, int] = {}
    for at, process, cpu, what in notes:
        column = columns.setdefault(process, len(columns))
        seconds = float(at) - float(notes[0][0])
        print(f"{seconds:7.3f} {'   |' * column} process {column}, CPU {cpu} s: {what.rstrip()}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--timeline", action="store_true")
    options = parser.parse_args(arguments)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    isgd = [sys.executable, "-m", "dask", "isgd"]
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed([*isgd, "prepare", "digits"], folder, {"PYTHONPATH": path})
        for number in range(options.repeats):
            imports, _, _ = timed([sys.executable, "-c", IMPORTS], folder, {})
            train = [*isgd, "train", "digits", "--steps", str(options.steps), "--run", f"run-{number}", "--json"]
            seconds, cpu, printed = timed(train, folder, {"PYTHONPATH": path})
            training = float(json.loads(printed.splitlines()[-1])["seconds"])
            values = {"seconds": seconds, "training": training, "imports": imports, "cpu_seconds": cpu}
            found.append({**values, "ratio": seconds / (training + imports)})
        if options.timeline:
            file = folder / "timeline"
            environment = {"ISGD_TIMELINE": str(file), "ISGD_TIMELINE_CALLS": CALLS}
            train = [*isgd, "train", "digits", "--steps", str(options.steps), "--run", "traced", "--json"]
            timed(train, folder, {**environment, "PYTHONPATH": f"{TRACER}{os.pathsep}{path}"})
            show_timeline(file)
    result = {key: round(statistics.median(values[key] for values in found), 3) for key in found[0]}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
