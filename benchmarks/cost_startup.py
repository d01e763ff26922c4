"""The start-up of ``dask isgd train``, for ``cost.py``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

START_UP = "start-up"
MOST = 2.0
"""The seconds of the command, over those of its training and one import, must not be more."""
IMPORT = (sys.executable, "-c", "import torch, distributed, zarr, xarray, matplotlib")
ISGD = (sys.executable, "-m", "dask", "isgd")


def start_up(repeats: int, folder: Path) -> dict[str, Any]:
    """Compare ``dask isgd train digits`` on prepared data with its training plus one import."""
    run([*ISGD, "prepare", "digits"], folder)
    runs = []
    for number in range(repeats):
        imported = run(IMPORT, folder)
        command = run([*ISGD, "train", "digits", "--json", "--run", f"run-{number}"], folder)
        trained = json.loads(command["printed"].splitlines()[-1])["seconds"]
        ratio = command["seconds"] / (trained + imported["seconds"])
        runs.append({**command, "trained": trained, "imported": imported["seconds"], "ratio": ratio})
    names = ("seconds", "trained", "imported", "ratio", "page_faults", "system_share")
    middle = {name: median(one[name] for one in runs) for name in names}
    ratios = [one["ratio"] for one in runs]
    return {"row": START_UP, **middle, "must": MOST, "ratios": ratios, "reached": middle["ratio"] <= MOST}


def start_up_cells(r: dict[str, Any]) -> list[str]:
    """Return the cells of the row in the table of ``cost.py``."""
    plain = f"{r['trained']:.1f} s training + {r['imported']:.1f} s import"
    faults, kernel = f"{r['page_faults']:.3g}", f"{r['system_share']:.1%}"
    return [f"{r['seconds']:.1f} s", plain, f"{r['ratio']:.3f}", f"≤ {MOST:g}", "", faults, kernel]


def run(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a command; return what it printed, its seconds, page faults and the kernel's share, with its children's."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr[-2000:]}")
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return {
        "printed": done.stdout,
        "seconds": seconds,
        "page_faults": after.ru_minflt - before.ru_minflt,
        "system_share": system / (system + user),
    }
