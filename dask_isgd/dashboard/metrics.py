"""Runs in Prometheus' words, on the ``/metrics`` endpoint of Dask's scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dask_isgd.dashboard.watch import watches

_GAUGES = {
    "step": ("step", "Optimizer updates done"),
    "loss": ("loss", "Training loss of the newest report"),
    "validation_error": ("validation_error", "Share of the validation data classified wrongly"),
    "gain": ("gain", "Second moment under uniform draws over that under the proposal in use"),
    "gate_open": ("gate", "Whether draws follow the weights"),
    "ess_fraction": ("ess_fraction", "Effective sample size of the proposal, share of all examples"),
    "largest_coefficient": ("largest_coefficient", "Largest coefficient that can be drawn"),
    "mean_age_steps": ("mean_age", "Mean age of the weights"),
    "steps_per_second": ("steps_per_second", "Optimizer updates a second"),
    "scored_examples_per_second": ("scored_per_second", "Examples scored a second"),
}
_registered: list[Collector] = []


class RunCollector(Collector):
    """Reads the records of all schedulers in this process when it is asked."""

    def describe(self) -> list[Metric]:
        """Nothing before the first run: registration must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        records = [record for found in watches() for record in found.runs.values()]
        now = time.time()
        for name, (key, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"isgd_run_{name}", text, labels=["run"])
            for record in records:
                value = record.latest.get(key, math.nan)
                if math.isfinite(value):
                    gauge.add_metric([record.run], value)
            yield gauge
        faults = CounterMetricFamily("isgd_run_faults", "Things that were lost and made good", labels=["run"])
        starts = CounterMetricFamily("isgd_run_incarnations", "Learners that have run", labels=["run"])
        running = GaugeMetricFamily("isgd_run_running", "Whether the run is training", labels=["run"])
        for record in records:
            faults.add_metric([record.run], record.faults)
            starts.add_metric([record.run], record.latest.get("incarnation", 0))
            running.add_metric([record.run], float(record.status(now) == "running"))
        yield from (faults, starts, running)


def register() -> None:
    """Add the runs to what this process tells Prometheus, once."""
    if not _registered:
        _registered.append(RunCollector())
        prometheus_client.REGISTRY.register(_registered[0])
