"""A pipeline: a dataset that can be prepared, a model for it, and a recipe that trains it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dask_isgd.pipelines.recipes import Recipe

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Data in, experiment out. Cheap to list: nothing is imported before it is needed."""

    name: str
    about: str
    """One line for people who choose."""
    module: str
    """Has ``prepare(url, *, source=None) -> url``."""
    make_recipe: Callable[[], Recipe]

    def prepare(self, url: str, *, source: str | None = None) -> str:
        """Write the dataset to ``url``, a path or URL, if it is not there yet; returns ``url``.

        ``source`` is a folder with the original files, where the dataset has any.
        """
        prepared: str = importlib.import_module(self.module).prepare(url, source=source)
        return prepared

    def model(self) -> nn.Module:
        """A new model, with fresh parameters."""
        from dask_isgd.core import models

        return models.build(self.recipe.model)

    @property
    def recipe(self) -> Recipe:
        """The recipe, with the defaults of Dask's configuration as they are now."""
        return self.make_recipe()
