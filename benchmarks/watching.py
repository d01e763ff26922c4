"""The cost of watching a run: the learner's steps per second with and without the dashboard's page open.

    python benchmarks/watching.py [--repeats 3] [--seconds 12] [--pages 3]

Bokeh's own client keeps the pages open, so that the scheduler's work is measured and
not a browser's. Measurements without and with pages alternate; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bokeh.client import pull_session

import dask_isgd as isgd
from dask_isgd.pipelines import PIPELINES

_SESSION_SECONDS = 17.0  # seconds for which a Bokeh server keeps an unused session


def rate(run: Any, seconds: float) -> float:
    """Return steps per second over some seconds."""
    first, began = run.latest["step"], time.monotonic()
    time.sleep(seconds)
    return float((run.latest["step"] - first) / (time.monotonic() - began))


def main(repeats: int, seconds: float, pages: int) -> float:
    """Print all rates; return the ratio of the two medians."""
    closed, opened = [], []
    with tempfile.TemporaryDirectory() as name, isgd.LocalCluster(2) as cluster, cluster.get_client() as client:
        folder = Path(name)
        data = isgd.Dataset(PIPELINES["digits"].prepare(str(folder / "digits.zarr")), group="train")
        learning = isgd.Learning(steps=10**8, batch_size=64, learning_rate=0.001, threads=1)
        run = isgd.fit(client, "dask_isgd.pipelines.models:digits", data, folder / "run", learning=learning)
        for latest in run.watch(timeout=120):
            if latest["step"] > 200:
                break
        url = client.dashboard_link.removesuffix("/status") + "/isgd"
        for _ in range(repeats):
            closed.append(rate(run, seconds))
            sessions = [pull_session(url=url) for _ in range(pages)]
            opened.append(rate(run, seconds))
            for session in sessions:
                session.close()
            time.sleep(_SESSION_SECONDS if seconds > 1 else 0.0)
        run.stop()
    ratio = statistics.median(opened) / statistics.median(closed)
    print(
        f"steps/s without a page {[round(x) for x in closed]}, with {pages} {[round(x) for x in opened]}: {ratio:.3f}"
    )
    return ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--pages", type=int, default=3)
    main(**vars(parser.parse_args()))
