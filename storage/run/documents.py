"""The two small files of a run, ``run.json`` and ``control.json``, checked when they are read: anyone can edit them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dask_isgd.errors import RunMismatchError, RunNotFoundError

FORMAT_VERSION = 3
"""2: the settings and the columns of the history have other names than in 1. 3: one array per part of the history."""
KIND = "dask_isgd run"
WANTS = ("run", "pause", "stop")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_LARGEST = 10**18
_KINDS: dict[str, tuple[type, ...]] = {
    "run": (str,),
    "chunk": (int,),
    "created": (int, float),
    "data": (dict,),
    "model": (dict,),
    "model.name": (str,),
    "model.signature": (dict,),
    "config": (dict,),
    "config.learning": (dict,),
    "config.learning.steps": (int,),
    "config.sampling": (dict,),
    "config.sampling.uniform": (bool,),
}
"""The parts of a run's document that the library itself reads."""


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Return the content of run.json."""
    return json.dumps({**document, "kind": KIND, "format_version": FORMAT_VERSION}, indent=1).encode()


def decode_document(data: bytes, place: str, wanted: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the document in run.json; ``wanted`` are the parts, such as ``"config.learning.steps"``, it must have.

    Raises RunNotFoundError if it describes no run, RunMismatchError for another format. ``place`` names the file.
    """
    document = _decode(data, place, "Restore it from a copy")
    if not isinstance(document, dict) or document.pop("kind", None) != KIND:
        raise RunNotFoundError(f"{place} does not describe a run of dask_isgd. Check the path")
    name = document.get("run")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        # the name becomes part of keys, topics and pages
        raise RunNotFoundError(
            f"{place}: got run name {str(name)[:80]!r}, wanted 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'; "
            "the file was edited by hand"
        )
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise RunMismatchError(
            f"{place}: got format version {version!r}, this version of dask_isgd reads "
            f"{FORMAT_VERSION}; use the version that wrote the run, or start a new run in another directory"
        )
    if wrong := list(_mistakes(document, wanted)):
        raise RunNotFoundError(f"{place} is damaged: {'; '.join(wrong)}. Restore it from a copy")
    return document


def _mistakes(document: Mapping[str, Any], wanted: tuple[str, ...]) -> Iterator[str]:
    for path, kinds in _KINDS.items():
        value: Any = document
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        expected = " or ".join(kind.__name__ for kind in kinds)
        if value is None:
            if path in wanted:
                yield f"{path}: got nothing, wanted {expected}"
        elif type(value) not in kinds or (type(value) is int and not 0 < value < _LARGEST):
            yield f"{path}: got {str(value)[:40]!r}, wanted {expected}"


def decode_control(data: bytes, place: str) -> dict[str, Any]:
    """Return what the user wants, and the number of the start that it is meant for. Raises RunNotFoundError."""
    control = _decode(data, place, "Delete it; the next start of the run writes another")
    attempt = control.get("attempt", 0) if isinstance(control, dict) else None
    if type(attempt) is not int or not 0 <= attempt < _LARGEST or control.get("want", "run") not in WANTS:
        raise RunNotFoundError(
            f"{place} is damaged: got {str(control)[:80]!r}, wanted a mapping with want: {', '.join(WANTS)} and "
            "attempt, a number. Delete it; the next start of the run writes another"
        )
    return {"want": "run", **control}


def _decode(data: bytes, place: str, advice: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunNotFoundError(f"{place} is not JSON: {error}. {advice}") from error
