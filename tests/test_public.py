"""The public surface, and what it costs to import it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dask_isgd as isgd

PUBLIC = [
    "Dataset",
    "Draw",
    "ImportanceBatchSampler",
    "ImportanceSampler",
    "Learning",
    "LocalCluster",
    "NormEngine",
    "Run",
    "Sampling",
    "Scorers",
    "Scoring",
    "Variance",
    "Weighted",
    "__version__",
    "attach",
    "attach_dashboard",
    "capture_norms",
    "fit",
    "gradient_norms",
    "gradient_variance",
    "predict",
    "register_rule",
    "score",
    "weighted_mean",
]


def test_the_public_names():
    assert sorted(isgd.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(isgd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        isgd.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "blocked"),
    [
        ("import dask_isgd; dask_isgd.Sampling(); dask_isgd.ImportanceSampler", "torch distributed zarr"),
        ("import dask_isgd; dask_isgd.gradient_variance", "torch distributed zarr"),
        ("from dask_isgd.storage import Dataset, WeightArray, History, Checkpoints", "torch distributed"),
        ("import dask_isgd.run.summary, dask_isgd.pipelines.commands.show", "torch xarray pandas matplotlib"),
        ("import dask_isgd.clusters.imports_preload", "torch zarr"),
        ("from dask_isgd.pipelines import PIPELINES; assert PIPELINES['digits'].recipe", "torch"),
        ("from dask_isgd.display import html, live, plots, text; from dask_isgd import events", "torch distributed"),
        ("import dask_isgd.dashboard; dask_isgd.attach_dashboard", "torch zarr"),
        ("import dask_isgd.dashboard", "torch zarr bokeh"),
        ("import dask_isgd; dask_isgd.gradient_norms", "distributed zarr"),
    ],
)
def test_what_each_part_can_do_without(code, blocked):
    guard = f"import sys\nfor name in {blocked.split()!r}: sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", guard + code], check=True, timeout=60)
