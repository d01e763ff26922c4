"""A run as people see it: a live line in the terminal, a table at the end, a card in a notebook.

Everything here takes plain mappings (``Run.latest``, ``Run.summary()``), so that a run can be shown
from its directory alone. A value that is missing, None or NaN is shown as a dash.
"""

from __future__ import annotations

import html as _html
import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, TextIO, TypeGuard

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

DASH = "–"
_LINE_SECONDS = 5.0


def _known(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A number for people: thousands set apart, ``digits`` significant digits, a dash for none.

    >>> number(1234567), number(0.012345), number(float("nan"))
    ('1,234,567', '0.0123', '–')
    """
    if not _known(value):
        return DASH
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: Any) -> str:
    """A share as a percentage with two decimals.

    >>> percent(0.0317)
    '3.17 %'
    """
    return f"{100 * value:.2f} %" if _known(value) else DASH


def factor(value: Any) -> str:
    """A gain: ``1.83×``."""
    return f"{value:.2f}×" if _known(value) else DASH


def duration(value: Any) -> str:
    """Seconds for people.

    >>> duration(7.31), duration(75), duration(7384)
    ('7.3 s', '1 min 15 s', '2 h 3 min')
    """
    if not _known(value):
        return DASH
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def measures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The newest measures of a run, as (name, text) in the order of every display."""
    return [
        ("loss", number(values.get("loss"))),
        ("test error", percent(values.get("test_error"))),
        ("gain", factor(values.get("gain"))),
        ("steps/s", number(values.get("steps_per_second"))),
        ("scored/s", number(values.get("scored_per_second"))),
        ("age", number(values.get("mean_age"))),
    ]


class LiveProgress:
    """Progress of a run on a stream, to be given to ``Run.wait(progress=...)``.

    On a terminal a bar that is redrawn in place; elsewhere (a log, a pipe) a plain line every
    ``seconds`` and at the last step. Use it as a context manager, and call it with ``Run.latest``.
    """

    def __init__(self, stream: TextIO, *, steps: int | None = None, seconds: float = _LINE_SECONDS) -> None:
        self.steps, self.seconds = steps, seconds
        self.console = Console(file=stream, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._said = -math.inf
        self._last = -1
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.fields[status]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[measures]}", style="cyan"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                refresh_per_second=4,
            )

    def __enter__(self) -> LiveProgress:
        if self._bar is not None:
            self._task = self._bar.add_task("run", total=self.steps, status="starting", measures="")
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
            shown = "  ".join(f"{name} {text}" for name, text in measures(values) if text != DASH)
            self._bar.update(self._task, completed=step, total=steps, status=status, measures=shown)
            return
        now = time.monotonic()
        if step != self._last and (now - self._said >= self.seconds or step == steps):
            self._said, self._last = now, step
            self.line(status, step, steps, values)

    def line(self, status: str, step: int, steps: int | None, values: Mapping[str, Any]) -> None:
        """One plain line, flushed, for logs."""
        of = f"/{steps:,}" if steps else ""
        shown = "  ".join(f"{name} {text}" for name, text in measures(values) if text != DASH)
        self.console.file.write(f"{status}  step {step:,}{of}  {shown}".rstrip() + "\n")
        self.console.file.flush()


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``Run.summary()`` as (name, text); rows without a value are left out."""
    variance = summary.get("variance") or {}
    traces = [variance.get(name) for name in ("ideal", "stale", "uniform")]
    roots = [number(math.sqrt(t)) if _known(t) and t >= 0 else DASH for t in traces]
    rows = [
        ("run", str(summary.get("run", DASH))),
        ("status", str(summary.get("status") or DASH)),
        ("steps", number(summary.get("steps"))),
        ("time", duration(summary.get("seconds"))),
        ("training loss", number(summary.get("train_loss"))),
        ("test error", percent(summary.get("test_error"))),
        ("gain over uniform", factor(summary.get("gain"))),
        ("√Tr Σ ideal / stale / uniform", DASH if set(roots) == {DASH} else " / ".join(roots)),
        ("examples scored", number(summary.get("scored"))),
        ("steps a second", number(summary.get("steps_per_second"))),
    ]
    return [(name, text) for name, text in rows if text != DASH]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """``Run.summary()`` as a table of two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", overflow="fold")
    for name, text in summary_rows(summary):
        table.add_row(name, Text(text))  # not a str: a run's name is no markup
    return table


def print_summary(summary: Mapping[str, Any], stream: TextIO) -> None:
    """The summary on a stream, with colours only where it is a terminal."""
    Console(file=stream, highlight=False).print(summary_table(summary))


def page(run: str, summary: Mapping[str, Any], svg: str) -> str:
    """A whole HTML page of a run: its figures and a picture (SVG, trusted). Needs no other file."""
    rows = "".join(
        f"<tr><td>{_html.escape(name)}</td><td><b>{_html.escape(text)}</b></td></tr>"
        for name, text in summary_rows(summary)
    )
    drawing = svg[svg.index("<svg") :]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_html.escape(run)}</title><style>'
        "body{font-family:Helvetica,Arial,sans-serif;color:#222;max-width:1100px;margin:24px auto;padding:0 16px}"
        "td{padding:2px 20px 2px 0}td:first-child{color:#6b6b6b}svg{width:100%;height:auto}"
        f"</style></head><body><h1>{_html.escape(run)}</h1><table>{rows}</table>{drawing}</body></html>\n"
    )


_STATUS_COLOURS = {"running": "#0072B2", "finished": "#009E73", "failed": "#D55E00", "stopped": "#E69F00"}


def html(run: str, status: str, values: Mapping[str, Any]) -> str:
    """The card of a run for notebooks: static HTML, escaped, without script or outside files.

    ``values`` is ``Run.latest``. It reads as well in a saved notebook, on a dark page, and without
    any style at all.
    """
    step, steps = values.get("step") or 0, values.get("steps")
    share = min(1.0, step / steps) if steps else 0.0
    colour = _STATUS_COLOURS.get(status, "#6b6b6b")
    progress = f"step {number(step)} of {number(steps)}" if steps else f"step {number(step)}"
    gate = {1: "open", 0: "closed"}.get(values.get("gate", -1))
    shown = [*measures(values), *([("gate", gate)] if gate else [])]
    cells = "".join(
        f'<td style="text-align:left;padding:2px 18px 2px 0"><div style="opacity:.65;font-size:85%">{_html.escape(k)}'
        f"</div><div><b>{_html.escape(v)}</b></div></td>"
        for k, v in shown
        if v != DASH
    )
    return (
        '<div style="border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:10px 14px;max-width:680px">'
        f'<div><b>{_html.escape(run)}</b> &nbsp;<span style="color:{colour}">{_html.escape(status)}</span>'
        f'<span style="float:right;opacity:.75">{_html.escape(progress)}</span></div>'
        '<div style="background:rgba(128,128,128,.25);border-radius:3px;height:6px;margin:8px 0">'
        f'<div style="background:{colour};border-radius:3px;height:6px;width:{100 * share:.1f}%"></div></div>'
        f'<table style="border:none;margin:0"><tr style="background:none">{cells}</tr></table></div>'
    )


class Shown(Protocol):
    """What can be shown: a ``Run``."""

    name: str

    @property
    def status(self) -> str: ...
    @property
    def latest(self) -> Mapping[str, Any]: ...


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookProgress:
    """The card of a run, updated in place while it is waited for; the last state is what gets saved."""

    def __init__(self, run: Shown) -> None:
        from IPython.display import display

        self._run = run
        self._handle = display(  # type: ignore[no-untyped-call]
            self._bundle(run.latest), raw=True, display_id=True
        )

    def __call__(self, values: Mapping[str, Any]) -> None:
        self._handle.update(self._bundle(values), raw=True)

    def _bundle(self, values: Mapping[str, Any]) -> dict[str, str]:
        status = self._run.status
        shown = "  ".join(f"{name} {text}" for name, text in measures(values) if text != DASH)
        plain = f"run {self._run.name}  {status}  step {number(values.get('step'))}  {shown}"
        return {"text/html": html(self._run.name, status, values), "text/plain": plain}
