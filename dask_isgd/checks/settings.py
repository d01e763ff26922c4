"""What can be wrong with settings that are each valid by themselves: found at ``fit``, all at once."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import dask.config
import torch

from dask_isgd import config
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.core import models
from dask_isgd.errors import ConfigError
from dask_isgd.storage import Dataset

logger = logging.getLogger(__name__)


def check_settings(learning: Learning, scoring: Scoring, sampling: Sampling, dataset: Dataset) -> None:
    """Raise ConfigError with every mistake of the settings, of Dask's configuration too."""
    mistakes = [
        *_kinds(learning, scoring, sampling),
        *_unknown("isgd", dask.config.get("isgd"), config.DEFAULTS["isgd"]),
    ]
    if not mistakes:
        mistakes += [*_device(learning), *_chunk(scoring, dataset), *_skipping(learning, scoring)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if learning.batch_size > len(dataset):
        logger.warning(
            "a minibatch of %d from %d examples: draws repeat some of them (Learning.batch_size)",
            learning.batch_size,
            len(dataset),
        )


def _kinds(*settings: object) -> Iterator[str]:
    for name, kind, value in zip(
        ("learning", "scoring", "sampling"), (Learning, Scoring, Sampling), settings, strict=True
    ):
        if not isinstance(value, kind):
            yield f"{name}: got {type(value).__name__}, wanted dask_isgd.{kind.__name__}(…)"


def _unknown(path: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Keys of Dask's configuration that mean nothing: a typing error in a file or a variable."""
    names = {name.replace("_", "-"): name for name in given}
    for name, spelt in names.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {path}.{close[0]}?" if close else f"known: {', '.join(known)}"
            yield f"Dask's configuration: unknown key {path}.{spelt}; {hint}"
        elif isinstance(known[name], Mapping):
            if isinstance(given[spelt], Mapping):
                yield from _unknown(f"{path}.{name}", given[spelt], known[name])
            else:
                yield f"Dask's configuration: {path}.{name}: got {given[spelt]!r}, wanted a mapping"


def _device(learning: Learning) -> Iterator[str]:
    try:
        torch.empty(0, device=models.device_of(learning.device))
    except (RuntimeError, AssertionError) as error:
        if learning.device.partition(":")[0] not in ("cuda", "mps", "xpu"):  # the learner's worker may have one
            yield f"Learning.device: got {learning.device!r}, wanted 'auto' or a torch device ({error})".splitlines()[0]


def _chunk(scoring: Scoring, dataset: Dataset) -> Iterator[str]:
    unit = dataset.chunk_size
    if scoring.chunk_size is not None and scoring.chunk_size % unit:
        yield f"Scoring.chunk_size: got {scoring.chunk_size}, wanted a multiple of {unit}, the dataset's chunk"


def _skipping(learning: Learning, scoring: Scoring) -> Iterator[str]:
    if learning.synchronous and scoring.skip_bad_chunks:
        yield "Scoring.skip_bad_chunks: got True, wanted False: Learning.synchronous waits for every chunk"
