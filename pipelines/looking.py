"""``dask isgd status`` and ``dask isgd plot``: a run from its directory alone, while it runs or after."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from dask_isgd import display, plots
from dask_isgd.errors import StorageFullError
from dask_isgd.run import summarise
from dask_isgd.storage import RunDirectory, read_history

FORMATS = (".png", ".svg", ".pdf")


def status(run: str, *, as_json: bool = False) -> None:
    """Print how far a run has come, as a table or as one line of JSON."""
    directory = RunDirectory(run)
    document = directory.document()
    steps = document["config"]["learning"]["steps"]
    history = read_history(directory.history)
    found = directory.checkpoints().latest()
    if found is None and not history.sizes.get("report", 0):
        summary: dict[str, Any] = {"run": directory.url, "steps": 0}
    else:
        summary = summarise(directory)
    reported = int(history["step"][-1]) if history.sizes.get("report", 0) else 0
    step = max(reported, int(summary["steps"]))
    if as_json:
        from dask_isgd.pipelines.training import as_json as line

        click.echo(line({**summary, "step": step, "of": steps, "finished": _finished(found)}))
        return
    where = "finished" if _finished(found) else f"step {step:,} of {steps:,}"
    display.print_summary({**summary, "run": run, "status": where, "steps": None}, sys.stdout)
    if found is not None:
        click.echo(f"newest checkpoint {found.name}")
    if not _finished(found):
        click.echo(_last_sign(Path(directory.history)))


def plot(run: str, path: str | None = None) -> str:
    """Draw a run into a file; returns its path."""
    directory = RunDirectory(run)
    directory.document()
    return save(read_history(directory.history), read_history(directory.history, prefix="evaluation"), run, path=path)


def save(history: Any, evaluations: Any, run: str, *, path: str | None = None) -> str:
    """Save the picture of a run, into its directory unless told otherwise; whole or not at all."""
    target = Path(path) if path is not None else Path(run) / "summary.png"
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial{target.suffix}")
    figure = plots.plot(history, evaluations, title=Path(run).name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial)
        os.replace(partial, target)
    except OSError as error:
        raise StorageFullError(f"{target}: cannot be written ({error.strerror}); pass another file (--to)") from error
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def _finished(checkpoint: Any) -> bool:
    return checkpoint is not None and bool(checkpoint.state.get("finished"))


def _last_sign(history: Path) -> str:
    """How long ago the history was written: a run that is silent for long is no longer running."""
    newest = max((file.stat().st_mtime for file in history.glob("*/step/c/*")), default=math.nan)
    if math.isnan(newest):
        return "no report yet"
    return f"last report {display.duration(max(0.0, time.time() - newest))} ago"
