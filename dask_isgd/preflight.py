"""Everything that can be wrong is found before training: first here, then on every worker."""

from __future__ import annotations

import asyncio
import platform
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed import Client

from dask_isgd import config, models
from dask_isgd.config import Learning, Sampling, Scoring
from dask_isgd.errors import (
    ClusterMismatchError,
    ConfigError,
    NoLearnerWorkerError,
    RunExistsError,
    RunMismatchError,
)
from dask_isgd.placement import LEARNER, lacks_resources, workers_of
from dask_isgd.settings import check_settings
from dask_isgd.spec import RunSpec
from dask_isgd.storage import Dataset, RunDirectory
from dask_isgd.trial import check_parameters, try_model

FORMAT_VERSION = 1
_PACKAGES = ("dask_isgd", "torch", "zarr", "numpy", "dask", "distributed")
_TASK_SECONDS = 1.0
_LEAVING = 5.0
"""Seconds within which the scheduler is to have noticed that a worker is gone."""
_LEAST_CHUNKS = 8


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no cluster."""

    spec: RunSpec
    document: dict[str, Any]
    """What ``run.json`` will hold, or holds."""
    resume: bool
    overwrite: bool


def check(
    model: models.ModelSource,
    data: Dataset | str | Path,
    run_dir: str | Path,
    *,
    loss: models.Loss | None = None,
    learning: Learning,
    scoring: Scoring | None = None,
    sampling: Sampling | None = None,
    validation: Dataset | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    detach: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Plan:
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
    function = loss if loss is not None else models.cross_entropy
    check_parameters(module)
    speed, classes = try_model(module, function, dataset, scoring, classify=loss is None)
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
    return Plan(spec, document, resume, overwrite)


def _chunk(dataset: Dataset, scoring: Scoring, learning: Learning, speed: float) -> int:
    """Examples a scoring task: a multiple of the dataset's chunk, about a second of work.

    Exact runs take a choice that no clock enters, so that two of them draw the same.
    """
    unit, length = dataset.chunk_size, len(dataset)
    if scoring.chunk is not None:
        return scoring.chunk
    if learning.exact:
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


def create(plan: Plan) -> None:
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


def wait_for_workers(client: Client) -> dict[str, Mapping[str, Any]]:
    """The workers, once there is one that can take the learner.

    Raises NoLearnerWorkerError after ``isgd.cluster.timeout``.
    """
    timeout = config.seconds("cluster.timeout")
    deadline = time.monotonic() + timeout
    while True:
        workers = workers_of(client)
        pinned = any(w.get("resources") for w in workers.values())
        if workers and (not pinned or any((w.get("resources") or {}).get(LEARNER) for w in workers.values())):
            return workers
        if workers and not any((w.get("resources") or {}).get("scorer") for w in workers.values()):
            return workers  # resources of other people's making
        left = deadline - time.monotonic()
        if left <= 0:
            raise NoLearnerWorkerError(
                f"no worker for the learner within {timeout:g} s: {len(workers)} workers, none of which declares the "
                f"resource {LEARNER!r}; start one with `dask worker SCHEDULER --resources 'learner=1' --nthreads 2`"
            )
        try:
            client.wait_for_workers(len(workers) + 1, timeout=min(left, 2.0))
        except TimeoutError:
            continue


def check_cluster(client: Client, plan: Plan) -> dict[str, Mapping[str, Any]]:
    """Every worker sees data and run directory, imports the model and runs the same versions.

    Runs beside whatever the workers do. Raises ClusterMismatchError naming worker and thing.
    """
    workers = wait_for_workers(client)
    if lacking := lacks_resources(workers, plan.spec.scoring):
        raise ConfigError(f"Scoring.resources: {lacking}; no worker could ever score")
    timeout = config.seconds("cluster.timeout")
    here = _versions()

    async def versions() -> dict[str, str]:  # by value: a worker may lack this package altogether
        import importlib.metadata as metadata
        import platform

        found = {"python": ".".join(platform.python_version_tuple()[:2])}
        for name in ("dask_isgd", "torch", "zarr", "numpy", "dask", "distributed"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "not installed"
        return found

    wrong: list[str] = []
    answers = _ask(client, versions, timeout)
    for address, there in answers.items():
        if isinstance(there, Exception):
            wrong.append(f"{address}: {there!r}")
            continue
        wrong += [
            f"{address}: {name} is {there.get(name)}, here it is {here[name]}"
            for name in here
            if there.get(name) != here[name]
        ]
    if not wrong:
        answers = _ask(client, _prove, timeout, plan.spec, plan.document)
        for address, answer in answers.items():
            wrong += (
                [f"{address}: {answer!r}"] if isinstance(answer, Exception) else [f"{address}: {a}" for a in answer]
            )
    if wrong:
        raise ClusterMismatchError(
            "workers cannot take part:\n"
            + "\n".join(sorted(wrong)[:10])
            + "\nWorkers need the same versions, the model "
            "importable, and the data and run directory under the same path or URL (a shared file system or store)"
        )
    if workers.keys() - answers.keys():  # one has died since: was it the learner's?
        return check_cluster(client, plan)
    return workers


def _ask(client: Client, function: Any, timeout: float, *args: Any) -> dict[str, Any]:
    async def limited() -> dict[str, Any]:
        answers: dict[str, Any] = await asyncio.wait_for(
            client.run(function, *args, on_error="return", asynchronous=True), timeout
        )
        return answers

    try:
        found: dict[str, Any] = client.sync(limited)
    except TimeoutError as error:
        raise ClusterMismatchError(
            f"workers did not answer the first check within {timeout:g} s; is one of them hanging or starting?"
        ) from error
    return _of_the_living(client, found)


def _of_the_living(client: Client, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Answers without those of workers that died or left meanwhile: they take no part."""
    # the operating system's errors have a number: those are of a path, say, and the worker's own
    silent = {a for a, answer in answers.items() if isinstance(answer, OSError) and answer.errno is None}
    deadline = time.monotonic() + _LEAVING
    while silent and silent & workers_of(client).keys() and time.monotonic() < deadline:
        time.sleep(0.05)
    there = workers_of(client) if silent else answers
    return {address: answer for address, answer in answers.items() if address not in silent or address in there}


def _versions() -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **{name: version(name) for name in _PACKAGES}}


async def _prove(spec: RunSpec, document: Mapping[str, Any]) -> list[str]:
    return await asyncio.to_thread(_proof, spec, document)


def _proof(spec: RunSpec, document: Mapping[str, Any]) -> list[str]:
    """What this worker cannot see or does not agree with."""
    wrong: list[str] = []
    try:
        if spec.directory.document().get("run") != spec.run:
            wrong.append(f"run directory {spec.url}: holds another run")
    except Exception as error:
        wrong.append(f"run directory {spec.url}: {error}")
    try:
        if spec.data.fingerprint() != document["data"]:
            wrong.append(f"data {spec.data!r}: differs from what the client sees")
    except Exception as error:
        wrong.append(f"data: {error}")  # which names it; a dataset that is not there cannot be shown
    try:
        if models.signature(models.build(spec.model)) != document["model"]["signature"]:
            wrong.append(f"model {models.name_of(spec.model)}: other parameters than on the client")
    except Exception as error:
        wrong.append(f"model {models.name_of(spec.model)}: {error}")
    return wrong
