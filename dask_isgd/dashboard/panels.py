"""Every panel by the name of its page."""

from __future__ import annotations

from collections.abc import Callable

from dask_isgd.dashboard.chunk_panels import AgeHistogram, AgeMap, Weights
from dask_isgd.dashboard.line_panels import Error, Gain, Loss, Sampling, Speed, Spread, Versions
from dask_isgd.dashboard.panel import Panel

PANELS: dict[str, Callable[[], Panel]] = {
    "loss": Loss,
    "error": Error,
    "spread": Spread,
    "gain": Gain,
    "sampling": Sampling,
    "speed": Speed,
    "versions": Versions,
    "ages": AgeMap,
    "age-histogram": AgeHistogram,
    "weights": Weights,
}
