"""Everything that can be checked without a cluster, before a run is submitted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_isgd import config
from dask_isgd.checks.model import check_model, check_parameters
from dask_isgd.checks.settings import check_settings
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.core import models
from dask_isgd.core.loss import Loss, cross_entropy
from dask_isgd.core.models import ModelSource
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import (
    RunExistsError,
    RunMismatchError,
)
from dask_isgd.storage import Dataset, RunDirectory

FORMAT_VERSION = 1
_TASK_SECONDS = 1.0
_LEAST_CHUNKS = 8


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check that needs no cluster."""

    spec: RunSpec
    document: dict[str, Any]
    """What ``run.json`` will hold, or holds."""
    resume: bool
    overwrite: bool


def check(
    model: ModelSource,
    data: Dataset | str | Path,
    run_dir: str | Path,
    *,
    loss: Loss | None = None,
    learning: Learning,
    scoring: Scoring | None = None,
    sampling: Sampling | None = None,
    validation: Dataset | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    detach: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> PreparedRun:
    """Data, labels, model, loss, settings and run directory, without a cluster.

    Raises ConfigError, DataError and its kind, ModelError, RunExistsError, RunNotFoundError or
    RunMismatchError.
    """
    scoring, sampling = scoring or Scoring(), sampling or Sampling()
    directory = RunDirectory(str(run_dir), storage_options=storage_options)
    directory.require_exclusive()
    if directory.exists() and not (resume or overwrite):
        raise RunExistsError(
            f"{directory.url}: holds a run already; pass resume=True to go on with it, overwrite=True to begin anew, "
            "or another directory"
        )
    former = directory.document() if resume else None
    dataset = data if isinstance(data, Dataset) else Dataset(str(data))
    held_out = validation if isinstance(validation, Dataset | None) else Dataset(str(validation))
    dataset.check(classify=loss is None)
    check_settings(learning, scoring, sampling, dataset)
    module = models.build(model, learning.seed)
    function = loss if loss is not None else cross_entropy
    check_parameters(module)
    speed, classes = check_model(module, function, dataset, scoring, classify=loss is None)
    for each in (dataset, held_out):
        if each is not None:
            each.check(classes=classes, classify=loss is None)
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "run": uuid.uuid4().hex[:10],
        "data": dataset.fingerprint(),
        "model": {"name": models.name_of(model), "signature": models.signature(module)},
        "chunk": _chunk(dataset, scoring, learning, speed),
    }
    if former is not None:
        _same(document, former)
        document = {**document, **{name: former[name] for name in ("run", "chunk", "created")}}
    else:
        document["created"] = time.time()
    document["config"] = {
        "learning": config.to_mapping(learning),
        "scoring": config.to_mapping(scoring),
        "sampling": config.to_mapping(sampling),
    }
    spec = RunSpec(
        run=document["run"],
        url=directory.url,
        storage_options=dict(storage_options or {}),
        model=model,
        data=dataset,
        validation=held_out,
        loss=loss,
        learning=learning,
        scoring=scoring,
        sampling=sampling,
        chunk=document["chunk"],
        attempt=time.time_ns() // 1_000_000,
        detach=detach,
    )
    return PreparedRun(spec, document, resume, overwrite)


def _chunk(dataset: Dataset, scoring: Scoring, learning: Learning, speed: float) -> int:
    """Examples a scoring task: a multiple of the dataset's chunk, about a second of work.

    Synchronous runs take a choice that no clock enters, so that two of them draw the same.
    """
    unit, length = dataset.chunk_size, len(dataset)
    if scoring.chunk_size is not None:
        return scoring.chunk_size
    if learning.synchronous:
        return unit
    wanted = min(speed * _TASK_SECONDS, length / _LEAST_CHUNKS)
    return unit * max(1, int(wanted // unit))


def _same(document: Mapping[str, Any], former: Mapping[str, Any]) -> None:
    wrong = [
        f"{part}.{name}: the run has {there!r}, this is {here!r}"
        for part, key in (("data", "data"), ("model", "model"))
        for name, there, here in _differences(former[key], document[key])
    ]
    if wrong:
        raise RunMismatchError(
            "cannot resume with other data or another model:\n"
            + "\n".join(wrong[:8])
            + "\nUse the run's own, or begin "
            "a new run in another directory"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*there, *here}):
        a, b = there.get(name), here.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [(f"{name}.{inner}", x, y) for inner, x, y in _differences(a, b)]
        elif a != b and not (name == "name" and isinstance(a, str)):
            found.append((name, a, b))
    return found


def create(plan: PreparedRun) -> None:
    """Make the run directory, or take over the one there is."""
    directory = plan.spec.directory
    if plan.resume:
        directory.sweep()
        directory.update(plan.document)
        directory.set_control(want="run", attempt=plan.spec.attempt)
        return
    directory.create(plan.document, overwrite=plan.overwrite)
    directory.create_weights(plan.spec.examples, plan.spec.chunk)
    directory.set_control(want="run", attempt=plan.spec.attempt)
