"""The dataset of a command: where it is by default, and the first time, when it is written."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dask_isgd.errors import DataError
from dask_isgd.names import nearest
from dask_isgd.pipelines.pipeline import Pipeline
from dask_isgd.storage.backends.stores import local_path


def default_data(name: str) -> str:
    """Return the default path of a pipeline's dataset."""
    return str(Path("data") / f"{name}.zarr")


def prepared_data(pipeline: Pipeline, given: str | None, source: str | None) -> str:
    """Return the place of a pipeline's dataset; if nothing is there, say so on stderr and write it there.

    ``given``: the place that the user named, if any. Raises DataError if it is surely misspelt: nothing is there, and
    this very dataset is at a place of nearly the same name.
    """
    url = given or default_data(pipeline.name)
    place = local_path(url)
    if place is not None and not place.exists():
        beside = misspelt(place, pipeline.name) if given is not None else None
        if beside is not None:
            raise DataError(
                f"--data {url}: there is nothing, but {beside} holds the dataset {pipeline.name}; pass that path, or "
                f"write another copy with `dask isgd prepare {pipeline.name} --to {url}`"
            )
        click.echo(f"no dataset at {url} yet: writing {pipeline.name} there", err=True)
    return pipeline.prepare(url, source=source)


def misspelt(place: Path, pipeline: str) -> Path | None:
    """Return the path that ``place``, where nothing is, nearly names and where a pipeline's dataset is; else None."""
    parent, missing = place.parent, [place.name]
    try:
        while not parent.exists():
            missing.insert(0, parent.name)
            parent = parent.parent
        close = nearest(missing[0], [child.name for child in parent.iterdir() if child.is_dir()])
        if close is None:
            return None
        meant = parent.joinpath(close, *missing[1:])
        if not meant.exists():
            return misspelt(meant, pipeline) if len(missing) > 1 else None
    except OSError:  # a file, or a folder that may not be read
        return None
    return meant if _pipeline_of(meant) == pipeline else None


def _pipeline_of(folder: Path) -> str | None:
    """Return the name of the pipeline that prepared a dataset, if one did."""
    try:
        name = json.loads((folder / "zarr.json").read_bytes())["attributes"]["prepared"]["pipeline"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)
