"""Checks at ``fit`` of settings that are valid one by one: every mistake is reported at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import dask.config
import torch

from dask_isgd import config
from dask_isgd.checks.optimizer import ignored_settings
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.core import models
from dask_isgd.errors import ConfigError
from dask_isgd.names import hint, hyphenated
from dask_isgd.storage import Dataset

logger = logging.getLogger(__name__)


def check_settings(learning: Learning, scoring: Scoring, sampling: Sampling, dataset: Dataset) -> None:
    """Raise ConfigError with every mistake in the settings and in Dask's configuration."""
    mistakes = [
        *_kinds(learning, scoring, sampling),
        *_unknown("isgd", dask.config.get("isgd"), config.DEFAULTS["isgd"]),
    ]
    if not mistakes:
        mistakes += [
            *_device(learning),
            *ignored_settings(learning),
            *_chunk(scoring, dataset),
            *_skipping(learning, scoring),
            *_sharing(learning, scoring),
            *_without_scores(learning, scoring, sampling),
            *_presampling(learning, sampling),
        ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if learning.batch_size > len(dataset):
        logger.warning(
            "Learning.batch_size: a minibatch of %d from %d examples draws some of them repeatedly",
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
    """Unknown keys in Dask's configuration: a typing error in a file or an environment variable."""
    names = {hyphenated(name): name for name in given}
    for name, spelling in names.items():
        if name not in known:
            what_to_do = hint(name, known, lambda key: f"{path}.{key}")
            yield f"Dask's configuration: unknown key {path}.{spelling}; {what_to_do}"
        elif isinstance(known[name], Mapping):
            if isinstance(given[spelling], Mapping):
                yield from _unknown(f"{path}.{name}", given[spelling], known[name])
            else:
                yield f"Dask's configuration: {path}.{name}: got {given[spelling]!r}, wanted a mapping"


def _device(learning: Learning) -> Iterator[str]:
    try:
        torch.empty(0, device=models.device_of(learning.device))
    except (RuntimeError, AssertionError) as error:
        if learning.device.partition(":")[0] not in ("cuda", "mps", "xpu"):  # the learner's worker may have it
            yield f"Learning.device: got {learning.device!r}, wanted 'auto' or a torch device ({error})".splitlines()[0]


def _chunk(scoring: Scoring, dataset: Dataset) -> Iterator[str]:
    unit = dataset.chunk_size
    if scoring.chunk_size is not None and scoring.chunk_size % unit:
        yield f"Scoring.chunk_size: got {scoring.chunk_size}, wanted a multiple of {unit}, the dataset's chunk"


def _skipping(learning: Learning, scoring: Scoring) -> Iterator[str]:
    if learning.synchronous and scoring.skip_bad_chunks:
        yield "Scoring.skip_bad_chunks: got True, wanted False: Learning.synchronous waits for every chunk"


def _sharing(learning: Learning, scoring: Scoring) -> Iterator[str]:
    learners = learning.learners
    yield from _averaging(learning)
    if learners == 1:
        return
    if scoring.skip_bad_chunks:
        yield f"Scoring.skip_bad_chunks: got True, wanted False: Learning.learners is {learners}, and all read the same"
    if learners == "all":
        return
    if learners > learning.batch_size:
        yield f"Learning.learners: got {learners}, wanted at most {learning.batch_size}, the examples of a minibatch"
    if learning.min_learners > learners:
        yield f"Learning.min_learners: got {learning.min_learners}, wanted at most {learners}, as Learning.learners"


def _averaging(learning: Learning) -> Iterator[str]:
    every = learning.sync_every
    if every == 1:
        if learning.outer_momentum != 0.0 or learning.outer_rate != 1.0:
            yield "Learning.outer_momentum, outer_rate: wanted 0 and 1, as learners with sync_every=1 average nothing"
        return
    if learning.learners == 1:
        yield f"Learning.sync_every: got {every}, wanted 1: a single learner has nobody to average with"
    if learning.publish_every % every:
        yield (
            f"Learning.publish_every: got {learning.publish_every}, wanted a multiple of {every}, Learning.sync_every: "
            "learners publish what they have averaged"
        )


def _presampling(learning: Learning, sampling: Sampling) -> Iterator[str]:
    if sampling.presample == 1:
        return
    if learning.learners != 1:
        yield f"Sampling.presample: got {sampling.presample}, wanted 1: several learners share minibatches as drawn"
    if sampling.uniform:
        yield f"Sampling.presample: got {sampling.presample}, wanted 1: uniform draws choose nothing"


def _without_scores(learning: Learning, scoring: Scoring, sampling: Sampling) -> Iterator[str]:
    if scoring.passes != 0 or sampling.uniform:
        return
    if learning.synchronous:
        yield "Scoring.passes: got 0, wanted 'auto': Learning.synchronous has everything scored in each round"
    if not sampling.feedback:
        yield "Sampling.feedback: got False, wanted True: with Scoring.passes=0 all weights come from feedback"
    if sampling.max_age_steps is not None:
        yield (
            f"Sampling.max_age_steps: got {sampling.max_age_steps}, wanted None: with Scoring.passes=0 no chunk is "
            "ever scored, and none would be drawn"
        )
