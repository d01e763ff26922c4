"""A YAML file that describes what to ingest, from where, and how::

    source: {xarray: weather.nc}         # or numpy: a.npz, images: folder, parquet: "part-*.parquet"
    inputs: [t, p]
    target: rain
    dimension: time
    time: time                           # split in order of time
    splits: {train: 0.8, test: 0.2}
    to: data/weather.zarr                # default: data/RECIPE.zarr

All keys except ``to`` are arguments of `ingest`. Paths are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from dask_isgd.errors import ConfigError
from dask_isgd.field_types import Bytes, Count, Fits, Flag, Natural, Text, is_number
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.validation import FileModel, Places, validate
from dask_isgd.yaml_file import read_yaml

_KINDS = ("xarray", "numpy", "images", "parquet")
_MODES = ("all", "each", "first", "last", "none", "auto")


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for item in value.items() for text in item)


def _are_splits(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(is_number(end) or isinstance(end, (str, date)) for end in value.values())
    )


Source = Annotated[
    Mapping[str, Any],
    Fits(
        lambda value: any(kind in value for kind in _KINDS) and all(isinstance(key, str) for key in value),
        f"a mapping with one of {', '.join(_KINDS)}",
        {
            "type": "object",
            "properties": {
                "xarray": {"type": "string", "description": "A file or URL that xarray opens."},
                "numpy": {"type": ["string", "object"], "description": "An .npz file, or .npy files by name."},
                "images": {"type": "string", "description": "A folder with one folder of images per class."},
                "parquet": {"type": "string", "description": "Parquet files; a pattern such as part-*.parquet."},
            },
            "anyOf": [{"required": [kind]} for kind in _KINDS],
        },
    ),
]
Splits = Annotated[
    Mapping[str, float | str],
    Fits(
        _are_splits,
        "a mapping of names to fractions, or to moments at which splits end",
        {"type": "object", "additionalProperties": {"type": ["number", "string"]}, "minProperties": 1},
    ),
    AfterValidator(lambda value: {str(k): v if is_number(v) else str(v) for k, v in value.items()}),  # dates
]
Inputs = Annotated[
    str | list[str],
    Fits(
        lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)),
        "a name or a list of names",
        {"type": ["string", "array"], "items": {"type": "string"}},
    ),
]
Dtypes = Annotated[
    Mapping[str, str],
    Fits(_are_texts, "a mapping of names to dtypes", {"type": "object", "additionalProperties": {"type": "string"}}),
]
Normalise = Annotated[
    str | Mapping[str, str],
    Fits(
        lambda value: value in _MODES if isinstance(value, str) else _are_texts(value),
        f"one of {', '.join(_MODES)}, or a mapping of inputs to these",
        {"anyOf": [{"enum": list(_MODES)}, {"type": "object", "additionalProperties": {"enum": list(_MODES)}}]},
    ),
]


class IngestRecipe(FileModel):
    """A dataset that is made from files: what to read and how to write it. Only what the file holds is passed on."""

    source: Source
    """One of xarray, numpy, images and parquet, with its options."""
    to: Text | None = None
    """Path or URL of the dataset; default: data/RECIPE.zarr."""
    inputs: Inputs | None = None
    """Names of the inputs; default: all columns of numbers except the target."""
    target: Text | None = None
    """Name of the target; default: target, label or y."""
    dimension: Text | None = None
    """The dimension that counts examples, for xarray; default: sample."""
    splits: Splits | None = None
    """Fractions of the rows by name; default: 0.9 train, 0.1 validation."""
    group: Text | None = None
    """A column: all rows with the same value are in one split."""
    time: Text | None = None
    """A column: earlier rows are in the split that is named earlier."""
    shuffle: Flag = True
    """Write the rows of a split in random order."""
    seed: Natural = 0
    chunk_size: Count | None = None
    """Rows per chunk; default: about 2 MB, at most 8192 rows."""
    dtypes: Dtypes | None = None
    """Dtypes by name; default: float64 becomes float32."""
    normalise: Normalise = "auto"
    """What each input's mean and deviation are taken over."""
    classify: Flag | None = None
    """Whether the target is a class; default: if it is an integer, a boolean or a string."""
    relabel: Flag = False
    """Number the target's values in sorted order."""
    missing: Literal["refuse", "keep"] = "refuse"
    """What to do about NaN and infinity."""
    compressed: Flag = False
    """Whether chunks are compressed."""
    memory: Bytes = "256MB"
    """Bytes of rows in memory at a time."""
    scratch: Text | None = None
    """Folder for one uncompressed copy of the rows during ingestion."""


def ingest_recipe(path: str | Path, url: str | None = None) -> str:
    """Ingest as the recipe in a YAML file describes, to ``url`` or to its ``to``; return the dataset's place.

    Raises ConfigError that lists every mistake in the file, and what `ingest` raises.
    """
    content = read_yaml(path, "a recipe")
    if not isinstance(content, Mapping) or not isinstance(content.get("source"), Mapping):
        raise ConfigError(f"{path}: got no source, wanted 'source:' with one of {', '.join(_KINDS)}")
    try:
        given = validate(IngestRecipe, content, Places()).given()
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error
    source, to = given.pop("source"), given.pop("to", None)
    return ingest(source, url or to or str(Path("data") / f"{Path(path).stem}.zarr"), **given)
