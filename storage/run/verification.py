"""Verifies a run directory as a whole, and tells what a resumed run would continue from and what it would lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dask_isgd.errors import IsgdError
from dask_isgd.storage.run.directory import RunDirectory

_PARTS = ("run", "config.learning.steps", "config.sampling.uniform", "chunk", "data", "model", "created")


@dataclass(frozen=True)
class Finding:
    """What was found of one part of a run."""

    part: str
    text: str
    damaged: bool = False


@dataclass
class Verification:
    """The state of a run directory."""

    findings: list[Finding] = field(default_factory=list)
    resumable: bool = True
    """Whether a resumed run would train."""
    step: int = 0
    """The step that a resumed run continues from."""
    incarnation: int = 1
    """The incarnation of its learner."""
    steps_lost: int = 0
    """Steps that were reported and would be trained again; those since the last report are not known."""
    chunks_lost: int = 0
    """Scoring chunks without valid weights, which would be scored again."""

    @property
    def damaged(self) -> bool:
        """Whether anything is damaged."""
        return any(finding.damaged for finding in self.findings)


def verify(directory: RunDirectory) -> Verification:
    """Read everything in a run directory and change nothing. Raises RunNotFoundError if there is no run at all."""
    found = Verification()
    if not directory.exists():
        directory.document()  # says so
    reported = 0
    checks: dict[str, Callable[[RunDirectory, Verification], Iterator[Finding]]] = {
        "run.json": _document,
        "control.json": _control,
        "leases": _leases,
        "checkpoints": _checkpoints,
        "weights": _weights,
    }
    for part, check in checks.items():
        try:
            found.findings += check(directory, found)
        except (IsgdError, OSError) as error:
            found.findings.append(Finding(part, str(error), damaged=True))
            found.resumable = found.resumable and part != "run.json"
    for prefix in ("learner", "evaluation"):
        try:
            steps = directory.read_history(prefix).step.values
        except (IsgdError, OSError) as error:
            found.findings.append(Finding("history", str(error), damaged=True))
            continue
        last = int(steps[-1]) if len(steps) else 0
        found.findings.append(Finding("history", f"{len(steps):,} reports of the {prefix}, the last of step {last:,}"))
        reported = max(reported, last) if prefix == "learner" else reported
    found.steps_lost = max(0, reported - found.step)
    return found


def _document(directory: RunDirectory, _: Verification) -> Iterator[Finding]:
    document = directory.document(*_PARTS)
    steps = document["config"]["learning"]["steps"]
    yield Finding("run.json", f"run {document['run']} of {steps:,} steps, format {document['format_version']}")


def _control(directory: RunDirectory, _: Verification) -> Iterator[Finding]:
    control = directory.control()
    yield Finding("control.json", f"start {control.get('attempt', 0)}, wanted: {control['want']}")


def _leases(directory: RunDirectory, found: Verification) -> Iterator[Finding]:
    found.incarnation = directory.next_incarnation("learner")
    for role in ("learner", "coordinator"):
        leases = directory.leases(role)
        highest = leases.highest()
        owner = leases.owner(highest) if highest else {}
        held = f", last acquired on {owner.get('host', 'an unknown host')}" if highest else ""
        yield Finding("leases", f"{highest} of the {role}{held}")


def _checkpoints(directory: RunDirectory, found: Verification) -> Iterator[Finding]:
    checkpoints = directory.checkpoints()
    names, valid = checkpoints.names(), 0
    for name in names:
        try:
            checkpoint = checkpoints.load(name)
        except IsgdError as error:
            yield Finding("checkpoints", str(error), damaged=True)
            continue
        valid, found.step = valid + 1, checkpoint.step
        size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        yield Finding("checkpoints", f"{name}: {len(checkpoint.tensors)} tensors, {size / 1e6:,.1f} MB")
    if not names:
        yield Finding("checkpoints", "none")
    found.resumable = found.resumable and (valid > 0 or not names)


def _weights(directory: RunDirectory, found: Verification) -> Iterator[Finding]:
    document = directory.document()
    if document.get("config", {}).get("sampling", {}).get("uniform"):
        yield Finding("weights", "none are needed: draws are uniform")
        return
    weights = directory.open_weights()
    found.chunks_lost = weights.n_chunks
    if document.get("chunk") not in (None, weights.chunk_size):
        yield Finding("weights", f"{weights!r}, wanted chunks of {document['chunk']}", damaged=True)
        return
    scored = np.isfinite(weights.read_stamps()[:, 0])
    for chunk in range(weights.n_chunks):
        try:
            there = bool(np.isfinite(weights.read(chunk)).any())
        except IsgdError as error:
            yield Finding("weights", str(error), damaged=True)
            continue
        found.chunks_lost -= there
        if scored[chunk] and not there:
            yield Finding("weights", f"chunk {chunk} was scored, and its weights are gone", damaged=True)
    yield Finding("weights", f"{weights.n_chunks - found.chunks_lost} of {weights.n_chunks} chunks are scored")
