"""Check that every worker can read the data, the run directory and the model, and has the same package versions."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Mapping, Set
from importlib.metadata import version
from typing import Any, Literal

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
from dask_isgd.runtime.imports import THREAD
from dask_isgd.runtime.placement import LEARNER, learner_places, missing_resources, too_few_places, workers_of

_PACKAGES = ("dask_isgd", "torch", "zarr", "numpy", "dask", "distributed")
_POLL = 0.2
_DEPARTURE_SECONDS = 5.0
"""The time in which the scheduler notices that a worker has left."""


def wait_for_workers(
    client: Client, learners: int | Literal["all"] = 1, *, external: bool = False
) -> dict[str, Mapping[str, Any]]:
    """Return the workers as soon as all learners have a place; if the learner is ``external``, as soon as there is one.

    Raises NoLearnerWorkerError after ``isgd.cluster.timeout``.
    """
    if learners != 1 and learners != "all":
        return _wait_for_places(client, learners)
    timeout = config.seconds("cluster.timeout")
    deadline = time.monotonic() + timeout
    while True:
        workers = workers_of(client)
        pinned = not external and any(w.get("resources") for w in workers.values())
        if workers and (not pinned or any((w.get("resources") or {}).get(LEARNER) for w in workers.values())):
            return workers
        if workers and not any((w.get("resources") or {}).get("scorer") for w in workers.values()):
            return workers  # their resources have nothing to do with this library
        left = deadline - time.monotonic()
        if left <= 0:
            if external:
                raise NoLearnerWorkerError(f"no worker within {timeout:g} s; start one with `dask worker SCHEDULER`")
            raise NoLearnerWorkerError(
                f"no worker for the learner within {timeout:g} s: none of {len(workers)} workers declares "
                f"the resource {LEARNER!r}; start one with `dask worker SCHEDULER --resources 'learner=1' --nthreads 2`"
            )
        try:
            client.wait_for_workers(len(workers) + 1, timeout=min(left, 2.0))
        except TimeoutError:
            continue


def _wait_for_places(client: Client, learners: int) -> dict[str, Mapping[str, Any]]:
    timeout = config.seconds("cluster.timeout")
    deadline = time.monotonic() + timeout
    while len(places := learner_places(workers := workers_of(client))) < learners:
        if time.monotonic() > deadline:
            raise NoLearnerWorkerError(too_few_places(learners, len(places)))
        time.sleep(_POLL)
    return workers


def check_cluster(client: Client, prepared: PreparedRun) -> dict[str, Mapping[str, Any]]:
    """Check data, run directory, model and package versions on every worker; return the workers.

    The workers' tasks continue meanwhile. Raises ClusterMismatchError with each worker and what differs there, or if
    workers kept leaving during ``isgd.cluster.timeout``.
    """
    timeout = config.seconds("cluster.timeout")
    deadline = time.monotonic() + timeout
    while True:
        workers = wait_for_workers(client, prepared.spec.learning.learners, external=prepared.spec.external)
        gone = workers.keys() - _check_workers(client, prepared, workers, timeout)
        if not gone:
            return workers
        if time.monotonic() > deadline:  # each time one has died meanwhile, perhaps the learner's
            raise ClusterMismatchError(
                f"workers kept leaving while they were checked, for {timeout:g} s, at last {', '.join(sorted(gone))}; "
                "their logs say why: a lack of memory, or a scheduler that does not wait as long as imports take "
                "(distributed.scheduler.worker-ttl)"
            )


def _check_workers(
    client: Client, prepared: PreparedRun, workers: Mapping[str, Mapping[str, Any]], timeout: float
) -> Set[str]:
    """Return the workers that were found fit. Raises as `check_cluster` does."""
    if prepared.spec.scores and (lacking := missing_resources(workers, prepared.spec.scoring)):
        raise ConfigError(f"Scoring.resources: {lacking}; no worker could score. Change it or start such a worker")
    if sum(int(worker["nthreads"]) for worker in workers.values()) == 1 and prepared.spec.waits_for_scores:
        raise ConfigError(
            "Learning.synchronous: waits for scores, and the cluster has one worker with one thread, which the learner "
            "occupies. Start a second worker, or this one with --nthreads 2"
        )
    here = _versions()
    early = THREAD

    async def versions() -> dict[str, str]:  # pickled by value: a worker may not have this package
        import asyncio
        import importlib.metadata as metadata
        import platform
        import threading

        # so that nothing which is sent later imports beside a thread that does
        for thread in [thread for thread in threading.enumerate() if thread.name == early]:
            await asyncio.to_thread(thread.join)
        found = {"python": ".".join(platform.python_version_tuple()[:2])}
        for name in ("dask_isgd", "torch", "zarr", "numpy", "dask", "distributed"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "not installed"
        return found

    wrong: list[str] = []
    answers = ask_workers(client, versions, timeout)
    for address, there in answers.items():
        if isinstance(there, Exception):
            wrong.append(f"{address}: {there!r}")
            continue
        wrong += [
            f"{address}: {name} is {there.get(name)}, the client has {here[name]}"
            for name in here
            if there.get(name) != here[name]
        ]
    if not wrong:
        answers = ask_workers(client, _check_worker, timeout, prepared.spec, prepared.document)
        for address, answer in answers.items():
            wrong += (
                [f"{address}: {answer!r}"] if isinstance(answer, Exception) else [f"{address}: {a}" for a in answer]
            )
    if wrong:
        raise ClusterMismatchError(
            "some workers cannot take part in the run:\n"
            + "\n".join(sorted(wrong)[:10])
            + "\nEvery worker needs the same package versions, an importable model, and data and run directory at "
            "the same path or URL (a shared file system or store)"
        )
    return answers.keys()


def ask_workers(client: Client, function: Any, timeout: float, *args: Any) -> dict[str, Any]:
    """Run a function on every worker beside its tasks; return the results, or exceptions, by address.

    Raises ClusterMismatchError if not all have replied after ``timeout`` seconds.
    """

    async def limited() -> dict[str, Any]:
        answers: dict[str, Any] = await asyncio.wait_for(
            client.run(function, *args, on_error="return", asynchronous=True), timeout
        )
        return answers

    try:
        found: dict[str, Any] = client.sync(limited)
    except TimeoutError as error:
        raise ClusterMismatchError(
            f"not all workers replied to the first check within {timeout:g} s; is one of them hanging or starting? "
            "Remove it, or raise isgd.cluster.timeout"
        ) from error
    return _without_departed(client, found)


def _without_departed(client: Client, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answers without those of workers that have died or left meanwhile."""
    # an OSError with an errno comes from the worker's system, one without from the connection
    unreachable = {a for a, answer in answers.items() if isinstance(answer, OSError) and answer.errno is None}
    deadline = time.monotonic() + _DEPARTURE_SECONDS
    while unreachable and unreachable & workers_of(client).keys() and time.monotonic() < deadline:
        time.sleep(0.05)
    there = workers_of(client) if unreachable else answers
    return {address: answer for address, answer in answers.items() if address not in unreachable or address in there}


def _versions() -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **{name: version(name) for name in _PACKAGES}}


async def _check_worker(spec: RunSpec, document: Mapping[str, Any]) -> list[str]:
    return await asyncio.to_thread(_differences, spec, document)


def _differences(spec: RunSpec, document: Mapping[str, Any]) -> list[str]:
    """Return what this worker cannot read and what differs here from the client."""
    wrong: list[str] = []
    try:
        if spec.directory.document().get("run") != spec.run:
            wrong.append(f"run directory {spec.url}: holds another run")
    except Exception as error:
        wrong.append(f"run directory {spec.url}: {error}")
    try:
        if spec.data.fingerprint() != document["data"]:
            wrong.append(f"data {spec.data!r}: differs from the client's data")
    except Exception as error:
        wrong.append(f"data: {error}")  # the error names the dataset, whose repr would fail too
    try:
        if models.signature(models.build(spec.model)) != document["model"]["signature"]:
            wrong.append(f"model {models.name_of(spec.model)}: its parameters differ from the client's")
    except Exception as error:
        wrong.append(f"model {models.name_of(spec.model)}: {error}")
    return wrong
