"""A pipeline: a dataset that can be prepared, a model for it, and a recipe that trains the model."""

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
    """From a public dataset to an experiment. Pipelines are cheap to list: modules are imported on first use."""

    name: str
    about: str
    """Description in one line."""
    module: str
    """Module with a function ``prepare(url, *, source=None) -> url``."""
    make_recipe: Callable[[], Recipe]

    def prepare(self, url: str, *, source: str | None = None) -> str:
        """Write the dataset to ``url``, a path or URL, if it is not there yet; return ``url``.

        ``source`` is a folder with the original files, if the dataset has any.
        """
        prepared: str = importlib.import_module(self.module).prepare(url, source=source)
        return prepared

    def model(self) -> nn.Module:
        """Return a new model with initial parameters."""
        from dask_isgd.core import models

        return models.build(self.recipe.model)

    @property
    def recipe(self) -> Recipe:
        """The recipe, with the current defaults of Dask's configuration."""
        return self.make_recipe()
