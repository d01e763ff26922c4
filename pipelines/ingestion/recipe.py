"""A YAML file that says what to ingest, from where, and how::

    source: {xarray: weather.nc}         # or numpy: a.npz, images: folder, parquet: "part-*.parquet"
    inputs: [t, p]
    target: rain
    dimension: time
    time: time                           # split in order of time
    splits: {train: 0.8, test: 0.2}
    to: data/weather.zarr                # default: data/RECIPE.zarr

All keys but ``source`` and ``to`` are arguments of `ingest`. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path

import yaml

from dask_isgd.errors import ConfigError
from dask_isgd.pipelines.ingestion.ingest import ingest


def ingest_recipe(path: str | Path, url: str | None = None) -> str:
    """Ingest what the recipe says, to ``url`` or where it says; returns the place.

    Raises ConfigError with every mistake in the file, and what `ingest` raises.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); wanted a recipe in YAML") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("source"), Mapping):
        raise ConfigError(f"{path}: got no source, wanted 'source:' with one of xarray, numpy, images, parquet")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    known = [name for name in inspect.signature(ingest).parameters if name not in ("source", "url", "client")]
    mistakes = []
    for key in sorted(settings.keys() - {*known, "source", "to"}):
        close = difflib.get_close_matches(key, [*known, "source", "to"], 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(['source', 'to', *known])}"
        mistakes.append(f"unknown key {key!r}; {hint}")
    if mistakes:
        raise ConfigError(f"{path}:\n" + "\n".join(mistakes))
    source = settings.pop("source")
    to = settings.pop("to", None)
    if isinstance(settings.get("splits"), Mapping):  # YAML makes dates of what looks like one
        numbers = (int, float)
        settings["splits"] = {str(k): v if isinstance(v, numbers) else str(v) for k, v in settings["splits"].items()}
    return ingest(source, url or to or str(Path("data") / f"{path.stem}.zarr"), **settings)
