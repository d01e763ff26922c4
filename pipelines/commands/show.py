"""``dask isgd status`` and ``plot``: they need only the directory of a run, during the run or after."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dask_isgd.display.html import page
from dask_isgd.display.live import LiveProgress
from dask_isgd.display.summary_table import print_summary
from dask_isgd.display.text import duration
from dask_isgd.errors import StorageFullError
from dask_isgd.run.summary import final_values, summarise
from dask_isgd.storage import RunDirectory
from dask_isgd.storage.backends.stores import join, open_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf", ".html")
_SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class RunProgress:
    """The progress of a run, read from its directory."""

    summary: dict[str, Any]
    step: int
    of: int
    finished: bool
    checkpoint: str | None
    silent_seconds: float
    """Seconds since the history was last written; NaN if it never was."""
    requested: str
    """The request of its user: "run", "pause" or "stop"."""
    values: dict[str, Any]
    """The latest report and evaluation, under the names of ``Run.latest``."""

    @property
    def state(self) -> str:
        """The state in words; only ``silent_seconds`` shows that a run was killed."""
        if self.finished:
            return "finished"
        prefix = {"pause": "paused, ", "stop": "stopped, "}.get(self.requested, "")
        return f"{prefix}step {self.step:,} of {self.of:,}"

    @property
    def ended(self) -> bool:
        """Whether the run has finished or was asked to stop."""
        return self.finished or self.requested == "stop"

    @property
    def status(self) -> str:
        """One word: "running", "paused", "stopped", "finished", or "silent" if no report has come for a minute."""
        if self.finished:
            return "finished"
        if self.silent_seconds > _SILENT_SECONDS and not self.ended:
            return "silent"
        return {"run": "running", "pause": "paused", "stop": "stopped"}[self.requested]


def read_progress(run: str) -> RunProgress:
    """Read the progress of a run. Raises RunNotFoundError if there is no run."""
    directory = RunDirectory(run)
    document = directory.document("config.learning.steps")
    history = directory.read_columns()
    evaluations = directory.read_columns("evaluation")
    found = directory.checkpoints().latest()
    reports = len(history["step"])
    summary: dict[str, Any] = {"run": directory.url, "steps": 0}
    if found is not None or reports:
        summary = summarise(directory)
    values: dict[str, Any] = {name: float(column[-1]) for name, column in history.items() if reports}
    if len(evaluations["step"]):
        values["validation_error"] = float(evaluations["error"][-1])
        values["validation_loss"] = float(evaluations["loss"][-1])
        values["evaluated"] = int(evaluations["step"][-1])
    step = max(int(history["step"][-1]) if reports else 0, int(summary["steps"]))
    return RunProgress(
        summary=summary,
        step=step,
        of=int(document["config"]["learning"]["steps"]),
        finished=found is not None and bool(found.state.get("finished")),
        checkpoint=found.name if found is not None else None,
        silent_seconds=max(time.time() - directory.reported(), 0.0),  # NaN stays NaN in this order
        requested=str(directory.control()["want"]),
        values={**values, "step": step, "steps": int(document["config"]["learning"]["steps"])},
    )


def status(run: str, *, as_json: bool = False) -> None:
    """Print the progress of a run as a table or as one line of JSON."""
    now = read_progress(run)
    if as_json:
        _print_json(now)
        return
    print_summary({**now.summary, "run": run, "status": now.state, "steps": None}, sys.stdout)
    if now.checkpoint is not None:
        click.echo(f"latest checkpoint {now.checkpoint}")
    if not now.finished:
        click.echo(_last_report(now))


def watch(run: str, *, as_json: bool = False, every: float = 2.0) -> None:
    """Print the progress of a run until it has ended: a bar on a terminal, elsewhere one line (of JSON) per update."""
    now = read_progress(run)
    if as_json:
        while True:
            _print_json(now)
            if now.ended:
                return
            time.sleep(every)
            now = read_progress(run)
    with LiveProgress(sys.stdout, steps=now.of, seconds=every) as progress:
        while True:
            progress({**now.values, **(final_values(now.summary) if now.ended else {}), "status": now.status})
            if now.ended:
                break
            time.sleep(every)
            now = read_progress(run)
    status(run)


def as_json(values: Mapping[str, Any]) -> str:
    """Return one line of strict JSON, in which NaN and infinity are null."""

    def strict(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): strict(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(values), allow_nan=False)


def _print_json(now: RunProgress) -> None:
    click.echo(as_json({**now.summary, "step": now.step, "of": now.of, "finished": now.finished}))


def plot(run: str, path: str | None = None) -> str:
    """Save the plot of a run; return the path of the file."""
    directory = RunDirectory(run)
    directory.document()
    return save_plot(directory, run, path=path)


def save_plot(directory: RunDirectory, run: str, *, path: str | None = None) -> str:
    """Save the plot of a run atomically, by default into its directory; return the path of the file.

    An HTML file needs no other file: it holds the run's summary and the plot as SVG.
    """
    from dask_isgd.display import plots

    name = directory.name
    target = path if path is not None else join(run, "summary.png")
    figure = plots.plot(directory.read_columns(), directory.read_columns("evaluation"), title=name)
    if not target.lower().endswith(".html"):
        return save_figure(figure, target)
    return save_figure(figure, target, lambda svg: page(name, read_progress(run).summary, svg))


def save_figure(figure: Figure, target: str, page: Callable[[str], str] | None = None) -> str:
    """Save a figure atomically, as the file's suffix says, or as the HTML that ``page`` makes of it as SVG.

    Return the path. Raises StorageFullError if it cannot be written.
    """
    place, _, file = target.rpartition("/")
    kind, drawn = Path(file).suffix.lower().removeprefix("."), io.BytesIO()
    figure.savefig(drawn, format="svg" if page is not None else kind)
    data = drawn.getvalue() if page is None else page(drawn.getvalue().decode()).encode()
    try:
        open_folder(place or ("/" if target.startswith("/") else ".")).replace(file, data)
    except (OSError, StorageFullError) as error:
        raise StorageFullError(f"{target}: cannot write the plot ({error}); pass another file with --to") from error
    return target


def _last_report(now: RunProgress) -> str:
    """Return the age of the last report in words; a run that has not reported for a long time no longer runs."""
    return "no report yet" if math.isnan(now.silent_seconds) else f"last report {duration(now.silent_seconds)} ago"
