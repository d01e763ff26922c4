"""The request for a run, and all checks of it that need no cluster."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dask_isgd import config
from dask_isgd.checks.data import dataset_of
from dask_isgd.checks.finite import check_finite
from dask_isgd.checks.model import check_model, check_parameters
from dask_isgd.checks.optimizer import check_optimizer
from dask_isgd.checks.resume import changed_settings, require_resumable
from dask_isgd.checks.settings import check_settings
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.core import models
from dask_isgd.core.loss import Loss, bce, cross_entropy, loss_of
from dask_isgd.core.models import ModelSource
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import RunMismatchError
from dask_isgd.storage import Dataset, RunDirectory

logger = logging.getLogger(__name__)

_TASK_SECONDS = 1.0
_LEAST_CHUNKS = 8
_LONGEST_NAME = 48
ENDLESS = 10**9
"""The steps of a loop that does not know how many it will make."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The arguments of ``fit``: what to train, on what, where and how."""

    model: ModelSource
    data: Any
    """A ``Dataset``, a path, a URL, or an object in memory."""
    run_dir: str | Path
    loss: Loss | str | None = None
    learning: Learning
    scoring: Scoring = field(default_factory=Scoring)
    sampling: Sampling = field(default_factory=Sampling)
    validation: Any = None
    resume: bool = False
    overwrite: bool = False
    detach: bool = False
    external: bool = False
    """Whether the learner is a loop outside the cluster."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def directory(self) -> RunDirectory:
        """The run directory, which may not exist yet."""
        return RunDirectory(str(self.run_dir), storage_options=self.storage_options)


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check that needs no cluster."""

    spec: RunSpec
    document: dict[str, Any]
    """The content of ``run.json``, except what the run directory adds."""
    resume: bool
    overwrite: bool


def prepare(request: RunRequest) -> PreparedRun:
    """Check data, labels, model, loss, settings and run directory without a cluster.

    Raises ConfigError, a DataError, ModelError, RunExistsError, RunNotFoundError or RunMismatchError.
    """
    directory = request.directory
    former = directory.former(resume=request.resume, overwrite=request.overwrite)
    dataset, validation = _datasets(request)
    loss = loss_of(request.loss)
    classify = loss is None
    dataset.check(classify=classify)
    check_settings(request.learning, request.scoring, request.sampling, dataset)
    module, speed = _check_model(request, loss, dataset, validation)
    document: dict[str, Any] = {
        "run": f"{re.sub(r'[^A-Za-z0-9._-]', '_', directory.name)[:_LONGEST_NAME]}-{uuid.uuid4().hex[:8]}",
        "data": dataset.fingerprint(),
        "model": {"name": models.name_of(request.model), "signature": models.signature(module)},
        "chunk": _chunk_size(dataset, request, speed),
        "created": time.time(),
    }
    if former is not None:
        _require_same(document, former)
        _require_same_learner(directory, former, external=request.external)
        require_resumable(directory, former["run"], module, request.learning)
        document.update((name, former[name]) for name in ("run", "chunk", "created"))
    sampling = request.sampling.suited_to(request.learning)
    document["config"] = {
        "learning": config.to_mapping(request.learning),
        "scoring": config.to_mapping(request.scoring),
        "sampling": config.to_mapping(sampling),
    }
    if request.external:
        document["external"] = True
    if former is not None and (changes := changed_settings(former.get("config"), document["config"])):
        logger.warning("run %s resumes with other settings than before: %s", directory.name, "; ".join(changes))
    spec = RunSpec(
        run=document["run"],
        url=directory.url,
        storage_options=dict(request.storage_options),
        model=request.model,
        data=dataset,
        validation=validation,
        loss=loss,
        learning=request.learning,
        scoring=request.scoring,
        sampling=sampling,
        chunk=document["chunk"],
        # greater than any before, even if another client's clock is ahead of this one
        attempt=max(time.time_ns() // 1_000_000, directory.attempt() + 1),
        detach=request.detach,
        external=request.external,
    )
    return PreparedRun(spec, document, request.resume, request.overwrite)


def _datasets(request: RunRequest) -> tuple[Dataset, Dataset | None]:
    """The training and the validation data."""
    validation = request.validation
    return (
        dataset_of(request.data, request.directory.url),
        dataset_of(validation, request.directory.url) if validation is not None else None,
    )


def _check_model(
    request: RunRequest, loss: Loss | None, dataset: Dataset, validation: Dataset | None
) -> tuple[nn.Module, float]:
    """The model and the examples that it scores per second here, after a trial on a few examples."""
    classify = loss is None
    module = models.build(request.model, request.learning.seed)
    check_parameters(module)
    check_optimizer(module, request.learning)
    for each in (dataset, validation):
        if each is not None:
            check_finite(each, module, loss or cross_entropy, skip=request.scoring.skip_bad_chunks)
    speed, classes = check_model(module, loss or cross_entropy, dataset, request.scoring, classify=classify)
    if request.sampling.presample != 1:  # not every model that has exact norms has these bounds
        bounds = dataclasses.replace(request.scoring, method="bound", ignore=())
        check_model(module, loss or cross_entropy, dataset, bounds, classify=classify)
    for each in (dataset, validation):
        if each is not None:
            binary = loss is bce and each.arrays[each.target_name].dtype.kind in "iub"
            each.check(classes=2 if binary else classes, classify=classify or binary)
    return module, speed


def _chunk_size(dataset: Dataset, request: RunRequest, speed: float) -> int:
    """Examples per scoring task: a multiple of the dataset's chunk, about one second of work.

    A synchronous run gets a size that does not depend on any clock, so that two of them draw the same examples.
    """
    unit, length = dataset.chunk_size, len(dataset)
    if request.scoring.chunk_size is not None:
        return request.scoring.chunk_size
    if request.learning.synchronous:
        return unit
    wanted = min(speed * _TASK_SECONDS, length / _LEAST_CHUNKS)
    return unit * max(1, int(wanted // unit))


def _require_same(document: Mapping[str, Any], former: Mapping[str, Any]) -> None:
    """Raise RunMismatchError if the data or the model are not those of the run."""
    wrong = [
        f"{part}.{name}: the run has {there!r}, this is {here!r}"
        for part in ("data", "model")
        for name, there, here in _differences(former[part], document[part])
    ]
    if wrong:
        raise RunMismatchError(
            "cannot resume with other data or another model:\n"
            + "\n".join(wrong[:8])
            + "\nPass the data and the model of the run, or start a new run in another directory"
        )


def _require_same_learner(directory: RunDirectory, former: Mapping[str, Any], *, external: bool) -> None:
    """Raise RunMismatchError if a run of ``fit`` is resumed by a loop of its own, or the other way round."""
    made, wanted = ("Scorers" if each else "fit" for each in (former.get("external", False), external))
    if made != wanted:
        raise RunMismatchError(
            f"{directory.url} holds a run of {made}, this is {wanted}: resume it with {made}, or start a new run in "
            "another directory"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, former value and present value of each difference; the model's own name does not count."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*there, *here}):
        a, b = there.get(name), here.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [(f"{name}.{inner}", x, y) for inner, x, y in _differences(a, b)]
        elif a != b and not (name == "name" and isinstance(a, str)):
            found.append((name, a, b))
    return found


def create(prepared: PreparedRun) -> None:
    """Create the run directory, unless the run is resumed."""
    spec = prepared.spec
    if not prepared.resume:
        spec.directory.create(prepared.document, overwrite=prepared.overwrite)
        spec.directory.create_weights(spec.examples, spec.chunk)


def begin(prepared: PreparedRun) -> None:
    """Record this start of the run, once nothing keeps it from starting: an earlier start that still runs ends."""
    directory = prepared.spec.directory
    if prepared.resume:
        directory.sweep()
        directory.update(prepared.document)
        directory.repair_weights(prepared.spec.examples, prepared.spec.chunk)
    directory.set_control(want="run", attempt=prepared.spec.attempt)
