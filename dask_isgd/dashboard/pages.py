"""The documents that Bokeh serves: one page for everything, and one for each picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bokeh.core.properties import without_property_validation
from bokeh.layouts import column, layout, row
from bokeh.models import Div, Select
from distributed import Scheduler

from dask_isgd.dashboard import text
from dask_isgd.dashboard.panel import Panel
from dask_isgd.dashboard.panels import PANELS
from dask_isgd.dashboard.record import RunRecord
from dask_isgd.dashboard.watch import RunWatcher, watch
from dask_isgd.runtime.dask_internals import page_template

INTERVAL = 1000
"""Milliseconds between two looks of a page at the records."""
NEWEST = "the newest run"
_ROWS = (
    ("loss", "error", "spread", "gain"),
    ("sampling", "speed", "versions", "weights"),
)
_HEIGHT = 250
_FONT = {"font-family": "Helvetica, Arial, sans-serif"}


class Page:
    """A choice of run above some panels; follows the newest run unless one is chosen."""

    def __init__(self, heard: RunWatcher, panels: dict[str, Panel]) -> None:
        self.watch, self.panels = heard, panels
        self.select = Select(value=NEWEST, options=[NEWEST], width=330, height=32, name="run")
        self.header = Div(text="", sizing_mode="stretch_width", styles=_FONT, name="header")
        self.happenings = Div(
            text="", sizing_mode="stretch_both", styles={**_FONT, "overflow-y": "auto"}, name="happenings"
        )
        self._shown: tuple[RunRecord | None, int] = (None, -1)
        self.select.on_change("value", lambda attr, old, new: self.update())
        self.update()

    def record(self) -> RunRecord | None:
        """The run that is looked at."""
        newest = self.watch.newest()
        return self.watch.runs.get(self.select.value, newest[0] if newest else None)

    @without_property_validation  # type: ignore[untyped-decorator]
    def update(self) -> None:
        """Bring the page up to date; next to nothing where nothing has changed."""
        now = time.time()
        record = self.record()
        options = [NEWEST, *((each.run, text.label(each, now)) for each in self.watch.newest())]
        if options != self.select.options:
            self.select.options = options
        self.header.text = text.header(record, now)
        shown = (record, record.changes if record is not None else 0)
        if shown == self._shown:
            return
        self._shown = shown
        self.happenings.text = text.happenings(record)
        if record is not None:
            for panel in self.panels.values():
                panel.update(record)


def overview(scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """Everything about one run on one page."""
    page = Page(watch(scheduler), {name: make() for name, make in PANELS.items()})
    grid = [[page.panels[name].root for name in names] for names in _ROWS]
    lowest = row(
        column(page.panels["ages"].root, sizing_mode="stretch_both"),
        column(page.panels["age-histogram"].root, sizing_mode="stretch_both"),
        column(page.happenings, sizing_mode="stretch_both"),
        sizing_mode="stretch_width",
        height=_HEIGHT,
    )
    rows = [row(*panels, sizing_mode="stretch_width", height=_HEIGHT) for panels in grid]
    top = row(page.select, page.header, sizing_mode="stretch_width")
    _serve(doc, page, layout([top, *rows, lowest], sizing_mode="stretch_width"), "Dask: importance-sampled SGD")
    doc.template = page_template()
    doc.template_variables.update(extra)


def individual(name: str, scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """One panel that fills its page: for JupyterLab's panes."""
    panel = PANELS[name]()
    page = Page(watch(scheduler), {name: panel})
    _serve(doc, page, column(page.select, panel.root, sizing_mode="stretch_both"), f"Dask: {panel.title}")


def faults(scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """What has happened to a run."""
    page = Page(watch(scheduler), {})
    root = column(page.select, page.header, page.happenings, sizing_mode="stretch_both")
    _serve(doc, page, root, "Dask: faults and restarts")


def _serve(doc: Any, page: Page, root: Any, title: str) -> None:
    doc.title = title
    doc.add_root(root)
    doc.add_periodic_callback(page.update, INTERVAL)


PAGES: dict[str, Callable[[Scheduler, dict[str, Any], Any], None]] = {
    "/isgd": overview,
    "/individual-isgd-overview": overview,
    **{f"/individual-isgd-{name}": partial(individual, name) for name in PANELS},
    "/individual-isgd-faults": faults,
}
"""Path to document, as Dask's dashboard takes them."""
