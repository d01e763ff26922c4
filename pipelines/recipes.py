"""A recipe: everything a run needs but a cluster and a directory, in code or in YAML."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dask_isgd.config import Learning, Sampling, Scoring, from_mapping
from dask_isgd.errors import ConfigError

_CALLABLES = ("optimizer", "scheduler", "transform")
_Settings = TypeVar("_Settings", Learning, Scoring, Sampling)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained on what, and how.

    In YAML the same keys, ``learning``, ``scoring`` and ``sampling`` being mappings::

        data: fashion-mnist                          # a pipeline's name, a path or a URL
        model: dask_isgd.pipelines.models:fashion_mnist
        learning: {steps: 4000, learning_rate: 0.02}
        sampling: {gate: open}
        validation: test
    """

    data: str
    """The name of a pipeline, or a path or URL of a dataset."""
    model: str
    """``"package.module:name"`` of a callable without arguments."""
    learning: Learning
    scoring: Scoring = field(default_factory=Scoring)
    sampling: Sampling = field(default_factory=Sampling)
    validation: str | None = None
    """The group of the dataset that is evaluated on; None: no evaluation."""
    loss: str | None = None
    """``"package.module:name"`` of a loss per example; None: cross entropy."""


def load_recipe(path: str | Path, defaults: Mapping[str, Recipe] | None = None) -> Recipe:
    """The recipe in a YAML file; every mistake in it is reported at once.

    Keys may be spelled with hyphens. ``optimizer``, ``scheduler`` and ``transform`` are names,
    ``package.module:name``. Where ``data`` is a key of ``defaults`` (the pipelines' recipes), what
    the file leaves out is taken from there.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); wanted a recipe in YAML") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: got {type(content).__name__}, wanted a mapping with data, model and learning")
    try:
        return recipe_from_mapping(content, defaults)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def recipe_from_mapping(values: Mapping[str, Any], defaults: Mapping[str, Recipe] | None = None) -> Recipe:
    """A recipe from plain values, as :func:`load_recipe` reads them."""
    given = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = [f.name for f in dataclasses.fields(Recipe)]
    mistakes = []
    for key in given.keys() - set(known):
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        mistakes.append(f"Recipe: unknown key {key!r}; {hint}")
    base = (defaults or {}).get(str(given.get("data")))
    settings: dict[str, Any] = {}

    def part(name: str, kind: type[_Settings]) -> None:
        try:
            settings[name] = _settings(kind, given.get(name), getattr(base, name, None))
        except ConfigError as error:
            mistakes.append(str(error))

    part("learning", Learning)
    part("scoring", Scoring)
    part("sampling", Sampling)
    for name in ("data", "model", "validation", "loss"):
        settings[name] = given.get(name, getattr(base, name, None))
        if not isinstance(settings[name], str) and (name in ("data", "model") or settings[name] is not None):
            mistakes.append(f"Recipe.{name}: got {settings[name]!r}, wanted {_WANTED[name]}")
    if mistakes:
        raise ConfigError("\n".join(sorted(mistakes)))
    return Recipe(**settings)


_WANTED = {
    "data": "the name of a pipeline, a path or a URL",
    "model": "'package.module:name' of a callable that builds the model",
    "validation": "the name of a group of the dataset, or null",
    "loss": "'package.module:name' of a loss per example, or null",
}


def named(name: str) -> Callable[..., Any]:
    """The callable that ``"package.module:name"`` names."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"got {name!r}, wanted an importable 'package.module:name' ({error}); check the spelling"
        ) from error
    if not callable(found):
        raise ConfigError(f"got {name!r}, which is no callable but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _settings(kind: type[_Settings], values: Any, base: _Settings | None) -> _Settings:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__}: got {values!r}, wanted a mapping of settings")
    merged = {str(key).replace("-", "_"): value for key, value in values.items()}
    for name in _CALLABLES:
        if isinstance(merged.get(name), str):
            try:
                merged[name] = named(merged[name])
            except ConfigError as error:
                raise ConfigError(f"{kind.__name__}.{name}: {error}") from error
    if base is not None:
        merged = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)} | merged
    if kind is Learning and "steps" not in merged:
        raise ConfigError("Learning.steps: got nothing, wanted a whole number at least 1")
    return from_mapping(kind, merged)
