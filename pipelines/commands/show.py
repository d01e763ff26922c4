"""``dask isgd status`` and ``dask isgd plot``: a run from its directory alone, while it runs or after."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dask_isgd.display import plots
from dask_isgd.display.html import page
from dask_isgd.display.live import LiveProgress
from dask_isgd.display.summary_table import print_summary
from dask_isgd.display.text import duration
from dask_isgd.errors import StorageFullError
from dask_isgd.run.summary import summarise
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.backends.stores import join, open_folder

FORMATS = (".png", ".svg", ".pdf", ".html")
_SILENT = 60.0


@dataclass(frozen=True)
class Sight:
    """What one look at a run directory shows."""

    summary: dict[str, Any]
    step: int
    of: int
    finished: bool
    checkpoint: str | None
    silent: float
    """Seconds since the history was written; NaN where nothing was."""
    want: str
    """What its user asked for: "run", "pause" or "stop"."""
    values: dict[str, Any]
    """The newest report and evaluation, under the names of ``Run.latest``."""

    @property
    def state(self) -> str:
        """In words; a run that was killed cannot say so, but it is silent."""
        if self.finished:
            return "finished"
        where = f"step {self.step:,} of {self.of:,}"
        asked = {"pause": "paused, ", "stop": "stopped, "}.get(self.want, "")
        return asked + where

    @property
    def over(self) -> bool:
        """Whether nothing more is to come, as far as one can see."""
        return self.finished or self.want == "stop"


def stop(run: str) -> str:
    """Ask the learner of a run to commit and stop; what comes of it, in words. RunNotFoundError where there is none."""
    directory = RunDirectory(run)
    found = directory.checkpoints().latest()
    if found is not None and found.state.get("finished"):
        return f"run {run} is finished: step {found.step:,}"
    directory.set_control(want="stop")  # the learner looks at it about once a second
    return f"run {run} was asked to stop; its learner commits a checkpoint first. Go on with --run {run} --resume"


def look(run: str) -> Sight:
    """Look at a run; RunNotFoundError where there is none."""
    directory = RunDirectory(run)
    document = directory.document()
    history = directory.read_history()
    evaluations = directory.read_history("evaluation")
    found = directory.checkpoints().latest()
    reports = history.sizes.get("report", 0)
    summary: dict[str, Any] = {"run": directory.url, "steps": 0}
    if found is not None or reports:
        summary = summarise(directory)
    values: dict[str, Any] = {str(n): float(v[-1]) for n, v in history.data_vars.items()} if reports else {}
    if evaluations.sizes.get("report", 0):
        values["validation_error"] = float(evaluations["error"][-1])
    step = max(int(history["step"][-1]) if reports else 0, int(summary["steps"]))
    return Sight(
        summary=summary,
        step=step,
        of=int(document["config"]["learning"]["steps"]),
        finished=found is not None and bool(found.state.get("finished")),
        checkpoint=found.name if found is not None else None,
        silent=max(time.time() - directory.reported(), 0.0),  # NaN stays NaN in this order
        want=str(directory.control()["want"]),
        values={**values, "step": step, "steps": int(document["config"]["learning"]["steps"])},
    )


def status(run: str, *, as_json: bool = False) -> None:
    """Print how far a run has come, as a table or as one line of JSON."""
    seen = look(run)
    if as_json:
        _print_json(seen)
        return
    print_summary({**seen.summary, "run": run, "status": seen.state, "steps": None}, sys.stdout)
    if seen.checkpoint is not None:
        click.echo(f"newest checkpoint {seen.checkpoint}")
    if not seen.finished:
        click.echo(_last_sign(seen))


def watch(run: str, *, as_json: bool = False, every: float = 2.0) -> None:
    """Print how far a run has come until it has ended: a bar on a terminal, else a line (of JSON) a look."""
    seen = look(run)
    if as_json:
        while True:
            _print_json(seen)
            if seen.over:
                return
            time.sleep(every)
            seen = look(run)
    with LiveProgress(sys.stdout, steps=seen.of, seconds=every) as progress:
        while True:
            state = "silent" if seen.silent > _SILENT and not seen.over else "finished" if seen.finished else seen.want
            progress(
                {**seen.values, "status": {"run": "running", "pause": "paused", "stop": "stopped"}.get(state, state)}
            )
            if seen.over:
                break
            time.sleep(every)
            seen = look(run)
    status(run)


def as_json(values: Mapping[str, Any]) -> str:
    """One line of strict JSON: NaN and infinity become null."""

    def strict(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): strict(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(values), allow_nan=False)


def _print_json(seen: Sight) -> None:
    click.echo(as_json({**seen.summary, "step": seen.step, "of": seen.of, "finished": seen.finished}))


def plot(run: str, path: str | None = None) -> str:
    """Draw a run into a file; returns its path."""
    directory = RunDirectory(run)
    directory.document()
    return save(directory.read_history(), directory.read_history("evaluation"), run, path=path)


def save(history: Any, evaluations: Any, run: str, *, path: str | None = None) -> str:
    """Save the picture of a run, into its directory unless told otherwise; whole or not at all.

    HTML is one file that needs no other: the figures of the run and the picture as SVG.
    """
    name = RunDirectory(run).name
    target = path if path is not None else join(run, "summary.png")
    place, _, file = target.rpartition("/")
    kind = Path(file).suffix.lower().removeprefix(".")
    figure, drawn = plots.plot(history, evaluations, title=name), io.BytesIO()
    figure.savefig(drawn, format="svg" if kind == "html" else kind)
    data = drawn.getvalue()
    if kind == "html":
        data = page(name, look(run).summary, data.decode()).encode()
    try:
        open_folder(place or ("/" if target.startswith("/") else ".")).replace(file, data)
    except (OSError, StorageFullError) as error:
        raise StorageFullError(f"{target}: cannot be written ({error}); pass another file (--to)") from error
    return target


def _last_sign(seen: Sight) -> str:
    """How long ago the history was written: a run that is silent for long is no longer running."""
    return "no report yet" if math.isnan(seen.silent) else f"last report {duration(seen.silent)} ago"
