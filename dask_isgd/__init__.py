"""dask_isgd: importance-sampled SGD on Zarr data and Dask clusters.

Public names load on first use (PEP 562), so that the scheduler's dashboard and the
numpy-only sampler never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "fit": "run.api",
    "attach": "run.api",
    "Run": "run.run",
    "Learning": "config",
    "Scoring": "config",
    "Sampling": "config",
    "gradient_norms": "norms",
    "NormEngine": "norms",
    "capture_norms": "norms",
    "register_rule": "norms",
    "ImportanceSampler": "sampling",
    "Draw": "sampling",
    "gradient_variance": "sampling.variance",
    "Variance": "sampling.variance",
    "ImportanceBatchSampler": "loop",
    "Weighted": "loop",
    "Scorers": "loop.scorers",
    "score": "loop.one_pass",
    "predict": "loop.one_pass",
    "weighted_mean": "loop.loss",
    "LocalCluster": "clusters",
    "attach_dashboard": "dashboard",
    "Dataset": "storage",
}

_MODULES = {"lightning": "loop.lightning", "huggingface": "loop.huggingface"}
"""Bridges to other packages, which need extras; ``import *`` does not load them."""

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from dask_isgd.clusters import LocalCluster as LocalCluster
    from dask_isgd.config import Learning as Learning
    from dask_isgd.config import Sampling as Sampling
    from dask_isgd.config import Scoring as Scoring
    from dask_isgd.dashboard import attach_dashboard as attach_dashboard
    from dask_isgd.loop import ImportanceBatchSampler as ImportanceBatchSampler
    from dask_isgd.loop import Weighted as Weighted
    from dask_isgd.loop.loss import weighted_mean as weighted_mean
    from dask_isgd.loop.one_pass import predict as predict
    from dask_isgd.loop.one_pass import score as score
    from dask_isgd.loop.scorers import Scorers as Scorers
    from dask_isgd.norms import NormEngine as NormEngine
    from dask_isgd.norms import capture_norms as capture_norms
    from dask_isgd.norms import gradient_norms as gradient_norms
    from dask_isgd.norms import register_rule as register_rule
    from dask_isgd.run.api import attach as attach
    from dask_isgd.run.api import fit as fit
    from dask_isgd.run.run import Run as Run
    from dask_isgd.sampling import Draw as Draw
    from dask_isgd.sampling import ImportanceSampler as ImportanceSampler
    from dask_isgd.sampling.variance import Variance as Variance
    from dask_isgd.sampling.variance import gradient_variance as gradient_variance
    from dask_isgd.storage import Dataset as Dataset


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
