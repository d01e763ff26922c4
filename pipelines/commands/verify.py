"""``dask isgd verify``: check a run directory as a whole."""

from __future__ import annotations

import dataclasses
import json

import click

from dask_isgd.storage import RunDirectory
from dask_isgd.storage.run.verification import Verification, verify


def verify_run(run: str, *, as_json: bool = False) -> bool:
    """Print what is in a run directory, and what a resumed run would lose; return whether anything is damaged.

    Raises RunNotFoundError if there is no run.
    """
    found = verify(RunDirectory(run))
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(found), "damaged": found.damaged}))
        return found.damaged
    for finding in found.findings:
        click.echo(f"{'DAMAGED' if finding.damaged else 'ok':<8}{finding.part}: {finding.text}")
    click.echo(f"{'resume':<8}{conclusion(found)}")
    return found.damaged


def conclusion(found: Verification) -> str:
    """Return in one sentence what a resumed run would continue from and lose."""
    if not found.resumable:
        return "is refused until what is damaged has been restored or deleted"
    counts = {"reported steps to train again": found.steps_lost, "chunks to score again": found.chunks_lost}
    lost = [f"{what}: {count:,}" for what, count in counts.items() if count]
    begins = f"continues from step {found.step:,} as incarnation {found.incarnation}"
    return f"{begins}; {', '.join(lost) or 'nothing is lost'}"
