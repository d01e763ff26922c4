"""Reads YAML files that a user wrote: plain values only, of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dask_isgd.errors import ConfigError

MAX_VALUES = 100_000
"""Values in a file, with each alias counted as often as it is used."""


def read_yaml(path: str | Path, wanted: str) -> Any:
    """Return the content of a YAML file. Raises ConfigError that names the file and says what was ``wanted``.

    Nothing in a file can name a Python object. An alias that contains itself, or that multiplies into more than
    ``MAX_VALUES`` values, is refused: whatever walks over it would not return.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        size(content)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); wanted {wanted} in YAML") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply; wanted {wanted} in YAML") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that does not exist
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    return content


def size(content: Any) -> int:
    """Return how many values a YAML document holds. Raises ConfigError if an alias makes it endless or too large."""
    count = 0

    def walk(value: Any, above: frozenset[int]) -> None:
        nonlocal count
        count += 1
        if id(value) in above:
            raise ConfigError("an alias contains itself; write the value out instead")
        if count > MAX_VALUES:
            raise ConfigError(f"got more than {MAX_VALUES:,} values, aliases included; wanted fewer")
        if isinstance(value, (dict, list, tuple, set)):
            inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            for item in inside:
                walk(item, above | {id(value)})

    walk(content, frozenset())
    return count
