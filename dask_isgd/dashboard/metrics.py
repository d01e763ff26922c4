"""Runs as Prometheus metrics on the ``/metrics`` endpoint of Dask's scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dask_isgd.columns import COLUMNS
from dask_isgd.dashboard.run_watcher import watchers

_GAUGES = {
    "step": "step",
    "loss": "loss",
    "validation_error": "validation_error",
    "gain": "gain",
    "gate_open": "gate",
    "ess_fraction": "ess_fraction",
    "largest_coefficient": "largest_coefficient",
    "mean_age_steps": "mean_age",
    "steps_per_second": "steps_per_second",
    "scored_examples_per_second": "scored_per_second",
}
"""Names of metrics, without their prefix, and the columns that they show."""
_registered: list[Collector] = []


class RunCollector(Collector):
    """Reads the records of all schedulers in this process at each scrape."""

    def describe(self) -> list[Metric]:
        """Return nothing: without this, registration would collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        records = [record for found in watchers() for record in found.runs.values()]
        now = time.time()
        for name, key in _GAUGES.items():
            gauge = GaugeMetricFamily(f"isgd_run_{name}", COLUMNS[key].meaning, labels=["run"])
            for record in records:
                value = record.latest.get(key, math.nan)
                if math.isfinite(value):
                    gauge.add_metric([record.run], value)
            yield gauge
        faults = CounterMetricFamily("isgd_run_faults", "Losses that were repaired", labels=["run"])
        starts = CounterMetricFamily("isgd_run_incarnations", "Incarnations of the learner", labels=["run"])
        running = GaugeMetricFamily("isgd_run_running", "Whether the run is training", labels=["run"])
        for record in records:
            faults.add_metric([record.run], record.faults)
            starts.add_metric([record.run], record.latest.get("incarnation", 0))
            running.add_metric([record.run], float(record.status(now) == "running"))
        yield from (faults, starts, running)


def register() -> None:
    """Add the runs to the metrics of this process, once."""
    if not _registered:
        _registered.append(RunCollector())
        prometheus_client.REGISTRY.register(_registered[0])
