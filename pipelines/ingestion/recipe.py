"""A YAML file that describes what to ingest, from where, and how::

    source: {xarray: weather.nc}         # or zarr, numpy: a.npz, images: folder, parquet: "part-*.parquet", csv
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
from typing import Annotated, Any

from pydantic import AfterValidator

from dask_isgd.errors import ConfigError
from dask_isgd.field_types import Bytes, Count, Fits, Flag, Natural, Text, is_number
from dask_isgd.pipelines.ingestion.ingest import ingest
from dask_isgd.pipelines.ingestion.missing import FILL_RULES, ROW_RULES, check_rule
from dask_isgd.pipelines.ingestion.tables.opening import KINDS
from dask_isgd.validation import FileModel, Places, validate
from dask_isgd.yaml_file import read_yaml

_MODES = ("all", "each", "first", "last", "none", "auto")


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for item in value.items() for text in item)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _are_splits(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(is_number(end) or isinstance(end, (str, date)) for end in value.values())
    )


Source = Annotated[
    Mapping[str, Any],
    Fits(
        lambda value: any(kind in value for kind in KINDS) and all(isinstance(key, str) for key in value),
        f"a mapping with one of {', '.join(KINDS)}",
        {
            "type": "object",
            "properties": {
                "xarray": {"type": "string", "description": "A file or URL that xarray opens."},
                "zarr": {"type": ["string", "object"], "description": "A Zarr group, or Zarr arrays by name."},
                "numpy": {"type": ["string", "object"], "description": "An .npz file, or .npy files by name."},
                "images": {"type": "string", "description": "A folder with one folder of images per class."},
                "parquet": {"type": "string", "description": "Parquet files; a pattern such as part-*.parquet."},
                "csv": {"type": "string", "description": "CSV files; a pattern such as part-*.csv."},
            },
            "anyOf": [{"required": [kind]} for kind in KINDS],
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
Names = Annotated[
    list[str],
    Fits(_are_names, "a list of names", {"type": "array", "items": {"type": "string"}}),
]
Features = Annotated[
    list[str] | Mapping[str, list[str]],
    Fits(
        lambda value: _are_names(value) or (isinstance(value, Mapping) and all(map(_are_names, value.values()))),
        "a list of columns, or a mapping of names to such lists",
        {"type": ["array", "object"], "items": {"type": "string"}},
    ),
]
Missing = Annotated[
    str | float | Mapping[str, str | float],
    Fits(
        lambda value: check_rule(value) is None,
        "refuse, keep, drop, mean, median, a number, or a mapping of columns to mean, median, a number or a string",
        {
            "anyOf": [
                {"enum": [*ROW_RULES, *FILL_RULES]},
                {"type": "number"},
                {"type": "object", "additionalProperties": {"type": ["number", "string"]}},
            ]
        },
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
    """One of xarray, zarr, numpy, images, parquet and csv, with its options."""
    to: Text | None = None
    """Path or URL of the dataset; default: data/RECIPE.zarr."""
    inputs: Inputs | None = None
    """Names of the inputs; default: the features, else all columns of numbers except the target."""
    target: Text | None = None
    """Name of the target; default: target, label or y."""
    features: Features | None = None
    """Columns that are written side by side as one input; or such lists by name."""
    categorical: Names | None = None
    """Columns of numbers that are coded like strings."""
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
    """Rows per chunk; default: a sixty-fourth of the rows, at most 8192 and about 2 MB."""
    dtypes: Dtypes | None = None
    """Dtypes by name; default: float64 becomes float32."""
    normalise: Normalise = "auto"
    """What each input's mean and deviation are taken over."""
    classify: Flag | None = None
    """Whether the target is a class; default: if it is an integer, a boolean or a string."""
    relabel: Flag = False
    """Number the target's values in sorted order."""
    missing: Missing = "refuse"
    """What to do about missing values: refuse, keep, drop, mean, median, a number, or a mapping of columns to fills."""
    mask: Flag = False
    """Write beside each feature that was filled whether its value was missing."""
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
        raise ConfigError(f"{path}: got no source, wanted 'source:' with one of {', '.join(KINDS)}")
    try:
        given = validate(IngestRecipe, content, Places()).given()
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error
    source, to = given.pop("source"), given.pop("to", None)
    return ingest(source, url or to or str(Path("data") / f"{Path(path).stem}.zarr"), **given)
