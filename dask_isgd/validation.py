"""One validation for settings and files: pydantic finds the mistakes, this module words them.

All mistakes are reported at once, in a ConfigError with one line each: ``Learning.steps: got -1, wanted a whole number
at least 1``. What was wanted is taken from the JSON schema of the type, which is also the one that editors use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from dask_isgd.errors import ConfigError
from dask_isgd.field_types import WANTED
from dask_isgd.names import hint, keys_underscored, nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_T = TypeVar("_T")


@dataclass(frozen=True)
class Places:
    """How messages name the place of a mistake."""

    root: str = ""
    """Name of the outermost value; empty: its keys stand alone."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Names of keys of the outermost value that replace the root's."""
    spell: Callable[[str], str] = str
    """How a key is spelled."""

    def name(self, path: Sequence[str]) -> str:
        if path and path[0] in self.parts:
            return ".".join([self.parts[path[0]], *map(self.spell, path[1:])])
        return ".".join([*([self.root] if self.root else []), *map(self.spell, path)])


def sentences(errors: Iterable[ErrorDetails], schema: Mapping[str, Any], places: Places) -> list[str]:
    """Return one sentence per mistake, from pydantic's errors and the JSON schema of what was validated."""
    found = (_sentence(error, *_follow(schema, error["loc"]), places) for error in errors)
    return list(dict.fromkeys(found))  # each branch of a union reports the same mistake


def _sentence(error: ErrorDetails, path: Sequence[str], node: Mapping[str, Any], places: Places) -> str:
    place = places.name(path)
    prefix = f"{place}: " if place else ""
    got = "nothing" if error["type"] == "missing" else repr(error["input"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        key = places.spell(str(error["loc"][-1]))
        return f"{prefix}unknown key {key!r}; {hint(key, map(places.spell, node.get('properties', {})))}"
    if error["type"] == "unexpected_positional_argument":
        return f"{prefix}got {got} without a name, wanted each setting by name"
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, ConfigError):
        return f"{prefix}{reason}"
    close = nearest(str(error["input"]), map(str, _choices(node))) if error["type"] == "literal_error" else None
    suggestion = f"; did you mean {close!r}?" if close is not None else ""
    return f"{prefix}got {got}, wanted {wanted(node)}{suggestion}"


def wanted(node: Mapping[str, Any]) -> str:
    """Return in words what a part of a JSON schema accepts.

    >>> wanted({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'a whole number at least 1 or None'
    """
    if WANTED in node:
        return str(node[WANTED]).removeprefix("wanted ")
    if "anyOf" in node:
        return " or ".join(wanted(branch) for branch in node["anyOf"])
    if choices := _choices(node):
        return f"one of {', '.join(map(repr, choices))}"
    kinds = {
        "boolean": "True or False",
        "integer": "a whole number",
        "number": "a number",
        "string": "a string",
        "array": "a list",
        "null": "None",
    }
    bounds = {"exclusiveMinimum": "above", "minimum": "at least", "maximum": "at most"}
    words = " and ".join(f"{word} {node[key]:g}" for key, word in bounds.items() if key in node)
    return f"{kinds.get(node.get('type', 'object'), 'a mapping of settings')} {words}".rstrip()


def _choices(node: Mapping[str, Any]) -> list[Any]:
    return [
        *([node["const"]] if "const" in node else node.get("enum", [])),
        *(choice for branch in node.get("anyOf", []) for choice in _choices(branch)),
    ]


def _follow(schema: Mapping[str, Any], where: Sequence[str | int]) -> tuple[list[str], Mapping[str, Any]]:
    """The path as far as the schema describes it, and the part of the schema there."""

    def resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        branches = [branch for branch in node.get("anyOf", []) if "$ref" in branch]
        return resolved(branches[0]) if len(branches) == 1 else node

    path: list[str] = []
    node = resolved(schema)
    for key in where:
        if key not in node.get("properties", {}):
            break
        path.append(str(key))
        node = resolved(node["properties"][key])
    return path, node


def validate(kind: type[_T], values: Any, places: Places, also: Iterable[str] = ()) -> _T:
    """Return ``values`` as ``kind``. Raises ConfigError that lists every mistake, those in ``also`` included."""
    adapter: TypeAdapter[_T] = TypeAdapter(kind)
    mistakes = list(also)
    try:
        valid = adapter.validate_python(values)
    except ValidationError as error:
        mistakes += sentences(error.errors(include_url=False), adapter.json_schema(), places)
    if mistakes:
        raise ConfigError("\n".join(sorted(mistakes)))
    return valid


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[_T]) -> type[_T]:
    """Turn a class into a frozen, keyword-only dataclass that is validated at construction.

    Construction raises ConfigError that lists every mistake.
    """
    config = ConfigDict(extra="forbid", validate_default=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    construct = made.__init__

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            construct(self, *args, **values)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            found = sentences(errors, TypeAdapter(made).json_schema(), Places(made.__name__))
            raise ConfigError("\n".join(found)) from None

    made.__init__ = functools.wraps(construct)(__init__)
    return made  # type: ignore[no-any-return]


class FileModel(BaseModel):
    """What a mapping in a YAML file may hold; keys may be spelled with hyphens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, values: Any) -> Any:
        return keys_underscored(values)

    def given(self) -> dict[str, Any]:
        """Return the values that the file holds, without defaults."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: value.given() if isinstance(value, FileModel) else value for name, value in values.items()}
