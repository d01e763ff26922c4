"""``dask isgd prepare``: write a public dataset, or a user's own data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dask_isgd.errors import DataError
from dask_isgd.pipelines import PIPELINES
from dask_isgd.pipelines.commands.data import default_data
from dask_isgd.storage.backends.stores import normalise


def prepare(what: str, url: str | None, *, source: str | None, inputs: Sequence[str] | None, target: str | None) -> str:
    """Write the dataset of a pipeline, of a recipe, or of data at a path or URL; return its place.

    Raises ConfigError and DataError.
    """
    if what in PIPELINES:
        return PIPELINES[what].prepare(url or default_data(what), source=source)
    if what.endswith((".yaml", ".yml")):
        from dask_isgd.pipelines.ingestion.recipe import ingest_recipe

        return ingest_recipe(what, url)
    from dask_isgd.pipelines.ingestion.ingest import ingest

    place = url or default_data(Path(what.rstrip("/")).stem)
    if normalise(place) == normalise(what):
        raise DataError(f"{what}: the dataset would take the place of the data; pass another place with --to")
    return ingest(what, place, inputs=inputs, target=target)
