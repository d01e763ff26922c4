"""The progress of a run in a terminal or a log."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from dask_isgd.display.text import figures_line, steps_of

_LINE_SECONDS = 5.0
_ENDED = ("finished", "stopped")
_WITHOUT_FIGURES = 62
"""Columns of a terminal that status, bar, steps and time left take; figures get the rest."""


class LiveProgress:
    """Shows the progress of a run on a stream; pass it to ``Run.wait(progress=...)``.

    On a terminal it redraws a bar in place; elsewhere (a log, a pipe) it writes a plain line every
    ``seconds`` and at the end. Use it as a context manager, and call it with ``Run.latest``.
    """

    def __init__(self, stream: TextIO, *, steps: int | None = None, seconds: float = _LINE_SECONDS) -> None:
        self.steps, self.seconds = steps, seconds
        self.console = Console(file=stream, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._written = -math.inf
        self._last = -1
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.fields[status]}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[of]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                TextColumn("{task.fields[figures]}", style="cyan", table_column=Column(no_wrap=True)),
                console=self.console,
                refresh_per_second=4,
            )

    def __enter__(self) -> LiveProgress:
        if self._bar is not None:
            of = steps_of({"steps": self.steps})
            self._task = self._bar.add_task("run", total=self.steps, status="starting", of=of, figures="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, values: Mapping[str, Any]) -> None:
        step = values.get("step") or 0
        steps = values.get("steps") or self.steps
        status = str(values.get("status") or ("training" if step else "starting"))
        if self._bar is not None and self._task is not None:
            figures = figures_line(values, self.console.width - _WITHOUT_FIGURES)
            of = steps_of({"step": step, "steps": steps})
            self._bar.update(self._task, completed=step, total=steps, status=status, of=of, figures=figures)
            return
        now = time.monotonic()
        if status in _ENDED or (step != self._last and now - self._written >= self.seconds):
            self._written, self._last = now, step
            self.line(status, step, steps, values)

    def line(self, status: str, step: int, steps: int | None, values: Mapping[str, Any]) -> None:
        """Write one plain line and flush it, for logs."""
        of = steps_of({"step": step, "steps": steps})
        self.console.file.write(f"{status}  {of}  {figures_line(values)}".rstrip() + "\n")
        self.console.file.flush()
