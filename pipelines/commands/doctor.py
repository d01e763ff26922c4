"""``dask isgd doctor``: what this machine, a cluster and a store can do; the first half of a bug report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from dask_isgd import config
from dask_isgd.errors import IsgdError
from dask_isgd.storage import Dataset
from dask_isgd.storage.backends.folder import temporary_name
from dask_isgd.storage.backends.stores import open_folder, redact


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    part: str
    text: str
    wrong: bool = False


def doctor(*, scheduler: str | None, data: str | None, run: str | None, as_json: bool = False) -> bool:
    """Print the findings, and return whether anything is wrong. Only what is passed is connected to or written."""
    findings: list[Finding] = []
    here: dict[str, Any] = {}
    with _noted(findings, "this process"):
        from dask_isgd.checks.environment import environment

        here = environment()
        findings += described(here)
    if scheduler is not None:
        with _noted(findings, f"cluster {redact(scheduler)}"):
            findings += _cluster(scheduler, here)
    if data is not None:
        with _noted(findings, f"data {redact(data)}"):
            findings.append(Finding("data", _read(data)))
    if run is not None:
        with _noted(findings, f"run directory {redact(run)}"):
            findings.append(Finding("run directory", _write(run)))
    if as_json:
        click.echo(json.dumps({"here": here, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            click.echo(f"{'WRONG' if finding.wrong else 'ok':<6}{finding.part}: {finding.text}")
    return any(finding.wrong for finding in findings)


def described(here: dict[str, Any]) -> list[Finding]:
    """Return what `environment` found as sentences."""

    def packages(versions: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {found or 'MISSING'}" for name, found in versions.items())

    lacking = [name for name, versions in here["extras"].items() if None in versions.values()]
    there = {k: v for name, versions in here["extras"].items() if name not in lacking for k, v in versions.items()}
    variables = ", ".join(f"{name}={value}" for name, value in here["variables"].items()) or "none is set"
    return [
        Finding("system", f"Python {here['python']} on {here['platform']}"),
        Finding("packages", packages(here["versions"]), wrong=None in here["versions"].values()),
        Finding("extras", f"{packages(there) or 'none'}; not installed: {', '.join(lacking) or 'none'}"),
        Finding("devices", f"{here['cpus']} CPUs, GPUs: {', '.join(here['gpus']) or 'none'}"),
        Finding("threads", f"torch uses {here['torch_threads']}"),
        Finding("allocator", f"{here['libc']}; variables: {variables}"),
    ]


def _cluster(address: str, here: dict[str, Any]) -> Iterator[Finding]:
    from distributed import Client

    from dask_isgd.checks.cluster import ask_workers
    from dask_isgd.checks.environment import CORE, environment
    from dask_isgd.runtime.placement import workers_of

    seconds = config.seconds("cluster.timeout")
    with Client(address, timeout=seconds, set_as_default=False) as client:
        workers = workers_of(client)
        roles = [", ".join(worker.get("resources") or {}) or "no resource" for worker in workers.values()]
        counts = ", ".join(f"{roles.count(role)} with {role}" for role in sorted(set(roles)))
        yield Finding("cluster", f"{len(workers)} workers{': ' + counts if counts else ''}", wrong=not workers)
        for worker, there in ask_workers(client, environment, seconds).items():
            if isinstance(there, Exception):
                yield Finding(f"worker {worker}", repr(there), wrong=True)
                continue
            other = [
                f"{name} is {there['versions'][name]}, here it is {here['versions'][name]}"
                for name in CORE
                if here and there["versions"][name] != here["versions"][name]
            ]
            gpus = ", ".join(there["gpus"]) or "no GPU"
            same = f"the same versions, {there['cpus']} CPUs, {gpus}, torch uses {there['torch_threads']} threads"
            yield Finding(f"worker {worker}", "; ".join(other) or same, wrong=bool(other))


def _read(url: str) -> str:
    """Return what lies at ``url``, after reading a row of it."""
    data = Dataset(url)
    if len(data):
        data.rows([0])
    return repr(data)


def _write(url: str) -> str:
    """Return that a run directory can be written, after trying; nothing is left there."""
    folder = open_folder(url)
    folder.require_exclusive()
    probe = temporary_name("doctor")
    try:
        folder.create(probe, b"")
    finally:
        folder.remove(probe)
        folder.remove_empty()
    return f"{redact(url)} can be written, and only one writer can create a file"


@contextmanager
def _noted(findings: list[Finding], part: str) -> Iterator[None]:
    """Add an error of the body as a finding: a doctor continues."""
    try:
        yield
    except (IsgdError, OSError, ImportError, ValueError) as error:
        findings.append(Finding(part, f"{type(error).__name__}: {error}", wrong=True))
