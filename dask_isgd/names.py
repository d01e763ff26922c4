"""Names that a user writes: the nearest valid one, hyphens for underscores, and callables by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dask_isgd.errors import ConfigError


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the valid name that ``name`` most resembles, or None if none comes close.

    >>> nearest("smoothin", ["scheme", "smoothing"])
    'smoothing'
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)


def hint(name: str, known: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """Return what to write instead of an unknown name: the nearest valid one, else all of them."""
    known = list(known)
    close = nearest(name, known)
    return f"did you mean {shown(close)}?" if close is not None else f"known: {', '.join(known)}"


def hyphenated(name: str) -> str:
    """Return the name as YAML files and Dask's configuration spell it."""
    return name.replace("_", "-")


def underscored(name: str) -> str:
    """Return the name as Python spells it."""
    return name.replace("-", "_")


def keys_underscored(values: Any) -> Any:
    """Return a mapping with its keys as Python spells them, and anything else as it is."""
    return {underscored(str(key)): value for key, value in values.items()} if isinstance(values, Mapping) else values


def named(name: str) -> Callable[..., Any]:
    """Return the callable that ``"package.module:name"`` names. Raises ConfigError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"got {name!r}, wanted an importable 'package.module:name' ({error}); "
            "check the spelling and that the package is installed"
        ) from error
    if not callable(found):
        raise ConfigError(f"got {name!r}, wanted the name of a callable; this is of type {type(found).__name__}")
    return found  # type: ignore[no-any-return]
