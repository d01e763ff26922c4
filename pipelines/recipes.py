"""A recipe: everything a run needs except a cluster and a directory, in code or in YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from dask_isgd.config import OF_DEFAULT_OPTIMIZER, Learning, Sampling, Scoring
from dask_isgd.errors import ConfigError
from dask_isgd.field_types import fits_text
from dask_isgd.names import keys_underscored
from dask_isgd.validation import Places, settings, validate
from dask_isgd.yaml_file import read_yaml

_PARTS = {kind.__name__.lower(): kind.__name__ for kind in (Learning, Scoring, Sampling)}


@settings
class Recipe:
    """What is trained on what, and how.

    In YAML the keys are the same; ``learning``, ``scoring`` and ``sampling`` are mappings::

        data: fashion-mnist                          # a pipeline's name, a path or a URL
        model: dask_isgd.pipelines.models:fashion_mnist
        learning: {steps: 4000, learning_rate: 0.02}
        sampling: {gate: open}
        validation: test
    """

    data: Annotated[str, fits_text("the name of a pipeline, a path or a URL")]
    """The name of a pipeline, or a path or URL of a dataset."""
    model: Annotated[str, fits_text("'package.module:name' of a callable that builds the model")]
    """``"package.module:name"`` of a callable without arguments."""
    learning: Learning
    scoring: Scoring = dataclasses.field(default_factory=Scoring)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    validation: Annotated[str, fits_text("the name of a group of the dataset")] | None = None
    """The group of the dataset that is evaluated on; None: no evaluation."""
    loss: Annotated[str, fits_text("mse, bce, huber or 'package.module:name' of a loss per example")] | None = None
    """``mse``, ``bce``, ``huber`` or ``"package.module:name"`` of a loss per example; None: cross entropy."""


def load_recipe(path: str | Path, defaults: Mapping[str, Recipe] | None = None) -> Recipe:
    """Return the recipe in a YAML file. Raises ConfigError that lists every mistake in it.

    Keys may be spelled with hyphens. ``optimizer``, ``scheduler`` and ``transform`` are names,
    ``package.module:name``. If ``data`` is a key of ``defaults`` (the pipelines' recipes), what
    the file leaves out comes from there.
    """
    content = read_yaml(path, "a recipe")
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: got {type(content).__name__}, wanted a mapping with data, model and learning")
    try:
        return recipe_from_mapping(content, defaults)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def recipe_from_mapping(values: Mapping[str, Any], defaults: Mapping[str, Recipe] | None = None) -> Recipe:
    """Return a recipe from plain values, as :func:`load_recipe` reads them."""
    given = keys_underscored(values)
    base = (defaults or {}).get(str(given.get("data")))
    merged = {**_fields(base), **given}
    for part in _PARTS:  # a part without a value under its key is one without settings
        own = {} if given.get(part) is None else keys_underscored(given[part])
        if isinstance(own, Mapping):
            of_base = _fields(getattr(base, part, None))
            for name in OF_DEFAULT_OPTIMIZER if own.get("optimizer") else ():
                of_base.pop(name, None)  # they suit the base's own optimizer
            own = {**of_base, **own}
        merged[part] = own
    return validate(Recipe, merged, Places("Recipe", _PARTS))


def _fields(value: Any) -> dict[str, Any]:
    return {} if value is None else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
