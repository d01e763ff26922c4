"""Public datasets, models, recipes, and the command line that runs them.

>>> from dask_isgd.pipelines import PIPELINES
>>> list(PIPELINES)
['digits', 'fashion-mnist', 'svhn', 'shuttle', 'land-mask', 'relief']
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.pipelines.pipeline import Pipeline
from dask_isgd.pipelines.recipes import Recipe, load_recipe

__all__ = ["PIPELINES", "Pipeline", "Recipe", "ingest", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name == "ingest":  # lazily: the command line lists pipelines without Zarr and xarray
        from dask_isgd.pipelines.ingestion.ingest import ingest

        return ingest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _digits() -> Recipe:
    return Recipe(
        data="digits",
        model="dask_isgd.pipelines.models:digits",
        learning=Learning(
            steps=800, batch_size=64, learning_rate=0.1, publish_every=20, report_every=10, evaluate_every=100
        ),
        # With so few examples the gate would hardly open before the end of the run.
        sampling=Sampling(gate="open"),
        validation="test",
    )


def _fashion_mnist() -> Recipe:
    return Recipe(
        data="fashion-mnist",
        model="dask_isgd.pipelines.models:fashion_mnist",
        learning=Learning(steps=8000, batch_size=64, learning_rate=0.04, scheduler="cosine"),
        validation="test",
    )


def _svhn() -> Recipe:
    """The paper's experiment at its larger learning rate: minibatch 128, Nesterov momentum 0.95."""
    return Recipe(
        data="svhn",
        model="dask_isgd.pipelines.models:svhn",
        learning=Learning(
            steps=100_000, batch_size=128, learning_rate=0.01, momentum=0.95, publish_every=32, evaluate_every=3200
        ),
        scoring=Scoring(batch_size=2048),
        validation="test",
    )


def _shuttle() -> Recipe:
    return Recipe(
        data="shuttle",
        model="dask_isgd.pipelines.models:shuttle",
        learning=Learning(steps=8000, batch_size=64, learning_rate=0.04, scheduler="cosine"),
        validation="test",
    )


def _land_mask() -> Recipe:
    return Recipe(
        data="land-mask",
        model="dask_isgd.pipelines.models:land_mask",
        learning=Learning(steps=8000, batch_size=64, learning_rate=0.04, scheduler="cosine"),
        validation="test",
    )


def _relief() -> Recipe:
    return Recipe(
        data="relief",
        model="dask_isgd.pipelines.models:relief",
        learning=Learning(steps=8000, batch_size=64, learning_rate=0.01, scheduler="cosine"),
        validation="test",
        loss="dask_isgd.core.loss:mse",
    )


PIPELINES: Mapping[str, Pipeline] = MappingProxyType(
    {
        pipeline.name: pipeline
        for pipeline in (
            Pipeline(
                name="digits",
                about="1,797 handwritten digits of 8×8; trains in seconds",
                module="dask_isgd.pipelines.datasets.digits",
                make_recipe=_digits,
            ),
            Pipeline(
                name="fashion-mnist",
                about="70,000 images of clothes, 28×28; trains in minutes",
                module="dask_isgd.pipelines.datasets.fashion_mnist",
                make_recipe=_fashion_mnist,
            ),
            Pipeline(
                name="svhn",
                about="630,420 house numbers, 32×32 in colour: the paper's experiment; trains in hours",
                module="dask_isgd.pipelines.datasets.svhn",
                make_recipe=_svhn,
            ),
            Pipeline(
                name="shuttle",
                about="58,000 states of a space shuttle, four of seven classes rare; needs r-cran-mlbench",
                module="dask_isgd.pipelines.datasets.shuttle",
                make_recipe=_shuttle,
            ),
            Pipeline(
                name="land-mask",
                about="250,000 places on the Earth: land or sea; hard along the coasts",
                module="dask_isgd.pipelines.datasets.land_mask",
                make_recipe=_land_mask,
            ),
            Pipeline(
                name="relief",
                about="250,000 elevations of the Earth, where importance sampling helps little; needs ferret-datasets",
                module="dask_isgd.pipelines.datasets.relief",
                make_recipe=_relief,
            ),
        )
    }
)
