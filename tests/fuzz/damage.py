"""Damage that hypothesis does to files: to their bytes, and to the values of JSON and YAML documents."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from hypothesis import strategies as st

INTEGERS = st.integers(-(2**70), 2**70) | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30])
WORDS = st.sampled_from(
    ["", "/", "..", "a:b", "os:system", "pickle", "vlen-utf8", "NaN", "Infinity", "1e999", "$x", "${HOME}", "\0", "é"]
)
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=8) | WORDS
VALUES = st.recursive(
    SCALARS, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside, max_size=3)
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a document."""
    yield path
    inside = document.items() if isinstance(document, dict) else enumerate(document) if _is_list(document) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


@st.composite
def damaged_document(draw: Callable[[Any], Any], document: Any) -> Any:
    """A document in which up to three values were replaced, removed, or renamed."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if how == "replace":
            holder[path[-1]] = draw(VALUES)
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(path[-1])
        else:
            del holder[path[-1]]
    return document


@st.composite
def damaged_bytes(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Bytes of which a stretch was overwritten, cut out or doubled."""
    if not data:
        return draw(st.binary(max_size=40))
    start = draw(st.integers(0, len(data) - 1))
    stop = min(len(data), start + draw(st.integers(0, 40)))
    middle = draw(st.sampled_from([b"", data[start:stop] * 2]) | st.binary(max_size=40))
    return data[:start] + middle + (b"" if draw(st.booleans()) and draw(st.booleans()) else data[stop:])


def damaged_json(data: bytes) -> st.SearchStrategy[bytes]:
    """The content of a JSON file, damaged in its values or its bytes."""
    values = damaged_document(json.loads(data)).map(lambda value: json.dumps(value).encode())
    return values | values | values | damaged_bytes(data)


def damaged_yaml(text: str) -> st.SearchStrategy[bytes]:
    """The content of a YAML file, damaged in its values or its bytes."""
    values = damaged_document(yaml.safe_load(text)).map(lambda value: yaml.safe_dump(value).encode())
    return values | values | values | damaged_bytes(text.encode())
