"""Types of the fields of settings and files: strict numbers, bytes, durations, callables by name.

They are strict: True is not a number, "3" is not 3, and 3.0 is not a whole number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dask.utils import parse_bytes, parse_timedelta
from pydantic import BeforeValidator, Field, Strict
from pydantic_core import core_schema

from dask_isgd.names import named

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

WANTED = "errorMessage"
"""Keyword of a JSON schema: the sentence that editors show instead of their own."""


@dataclass(frozen=True)
class Fits:
    """Annotation of a field whose value must pass a test. A test that raises TypeError or the like has failed."""

    test: Callable[[Any], bool]
    wanted: str
    """What passes the test, in words, for messages and editors."""
    schema: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What passes the test, as far as JSON schema can express it."""

    def _check(self, value: Any) -> Any:
        try:
            fits = self.test(value)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            fits = False
        if not fits:
            raise ValueError(self.wanted)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**self.schema, WANTED: f"wanted {self.wanted}"}


def fits_text(wanted: str) -> Fits:
    """Return an annotation for a string that is not empty."""
    return Fits(lambda value: isinstance(value, str) and value != "", wanted, {"type": "string", "minLength": 1})


def is_number(value: Any) -> bool:
    """Return whether a value is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any, least: int) -> bool:
    """Return whether a value is a whole number at least ``least``."""
    return is_number(value) and isinstance(value, int) and value >= least


def _bytes(least: int) -> Fits:
    return Fits(
        lambda value: not isinstance(value, bool) and parse_bytes(value) >= least,
        "a number of bytes or a string such as '2GB'",
        {"type": ["integer", "string"]},
    )


def _duration(wanted: str) -> Fits:
    return Fits(
        lambda value: not isinstance(value, bool) and parse_timedelta(value, default="s") > 0,
        wanted,
        {"type": ["number", "string"]},
    )


def _are_texts(value: Any) -> bool:
    """Return whether a value is a list or a tuple of strings that are not empty."""
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) and text != "" for text in value)


def _by_name(value: Any) -> Any:
    return named(value) if isinstance(value, str) else value


def _by_name_unless(*words: str) -> Callable[[Any], Any]:
    return lambda value: value if value in words else _by_name(value)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Flag = Annotated[bool, Strict()]
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    Fits(_are_texts, "a list of strings", {"type": "array", "items": {"type": "string", "minLength": 1}}),
]
Bytes = Annotated[int | str, _bytes(1)]
BytesOrZero = Annotated[int | str, _bytes(0)]
Seconds = Annotated[float | str, _duration("seconds or a string such as '10 minutes'")]
Duration = Annotated[float | str, _duration("a duration such as '10 minutes'")]
Function = Annotated[
    Callable[..., Any],
    Fits(callable, "a callable", {"type": "string", "pattern": r"^[\w.]+:\w+$"}),
    BeforeValidator(_by_name),
]
"""A callable, or its name: ``"package.module:name"``."""
Schedule = Annotated[
    Callable[..., Any] | Literal["cosine"],
    Fits(
        lambda value: callable(value) or value == "cosine",
        "'cosine' or a callable",
        {"type": "string", "pattern": r"^(cosine|[\w.]+:\w+)$"},
    ),
    BeforeValidator(_by_name_unless("cosine")),
]
"""A function that returns a learning-rate scheduler, its name, or the word for one."""
Resources = Annotated[
    Mapping[str, float],
    Fits(
        lambda value: all(isinstance(name, str) and is_number(n) and n > 0 for name, n in value.items()),
        "a mapping of resource names to positive numbers",
        {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
    ),
]
