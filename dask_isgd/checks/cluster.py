"""Whether every worker sees the data, the run directory and the model, and runs the same versions."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from distributed import Client

from dask_isgd import config
from dask_isgd.checks.request import PreparedRun
from dask_isgd.core import models
from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import (
    ClusterMismatchError,
    ConfigError,
    NoLearnerWorkerError,
)
from dask_isgd.runtime.placement import LEARNER, lacks_resources, workers_of

_PACKAGES = ("dask_isgd", "torch", "zarr", "numpy", "dask", "distributed")
_LEAVING = 5.0
"""Seconds within which the scheduler is to have noticed that a worker is gone."""


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


def check_cluster(client: Client, prepared: PreparedRun) -> dict[str, Mapping[str, Any]]:
    """Every worker sees data and run directory, imports the model and runs the same versions.

    Runs beside whatever the workers do. Raises ClusterMismatchError naming worker and thing.
    """
    workers = wait_for_workers(client)
    if lacking := lacks_resources(workers, prepared.spec.scoring):
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
        answers = _ask(client, _prove, timeout, prepared.spec, prepared.document)
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
        return check_cluster(client, prepared)
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
