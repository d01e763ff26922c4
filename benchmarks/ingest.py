"""The cost of ingesting: memory above all, then seconds.

    python benchmarks/ingest.py               # 3 GB, and four times that on disk
    python benchmarks/ingest.py --megabytes 1000
    python benchmarks/ingest.py --tiny        # what the tests run

Writes images of bytes to a file, ingests them in a separate process (shuffled, split, normalised,
checksummed) with a memory budget, and prints that process's peak memory and its excess over the budget (at most 150 MB,
for Python, numpy, xarray and Zarr), and the time for a plain copy of the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROW = (3, 32, 32)
INGEST = """
import json, re, sys, time
from dask_isgd.pipelines import ingest
folder, memory = sys.argv[1:]
began = time.perf_counter()
ingest({"numpy": {"image": folder + "/image.npy", "label": folder + "/label.npy"}}, folder + "/d.zarr", memory=memory)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak, "torch": "torch" in sys.modules}))
"""


def write(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    image = np.lib.format.open_memmap(folder / "image.npy", "w+", np.uint8, (rows, *ROW))
    for start in range(0, rows, 10_000):
        image[start : start + 10_000] = rng.integers(0, 256, image[start : start + 10_000].shape, np.uint8)
        image.flush()
    np.save(folder / "label.npy", rng.integers(0, 10, rows))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use small sizes: a test that it runs")
    parser.add_argument("--megabytes", type=int, default=3000)
    parser.add_argument("--memory", default="256MB")
    parser.add_argument("--folder", help="a folder with space for four times the data")
    options = parser.parse_args(argv)
    megabytes, memory = (10, "2MB") if options.tiny else (options.megabytes, options.memory)
    folder = Path(tempfile.mkdtemp(prefix="isgd-ingest-", dir=options.folder))
    try:
        write(folder, megabytes * 10**6 // int(np.prod(ROW)))
        began = time.perf_counter()
        shutil.copyfile(folder / "image.npy", folder / "copy")
        copy = time.perf_counter() - began
        (folder / "copy").unlink()
        command = [sys.executable, "-c", INGEST, str(folder), memory]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(folder)
    from dask.utils import parse_bytes

    measured = json.loads(done.stdout)
    result = {
        "megabytes": megabytes,
        "memory_MB": parse_bytes(memory) / 1e6,
        "peak_MB": round(measured["peak"] / 1e6, 1),
        "above_memory_MB": round((measured["peak"] - parse_bytes(memory)) / 1e6, 1),
        "seconds": round(measured["seconds"], 2),
        "copy_seconds": round(copy, 2),
        "torch_imported": measured["torch"],
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
