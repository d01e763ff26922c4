"""The documents that Bokeh serves: one page with everything, and one page per panel."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bokeh.core.properties import without_property_validation
from bokeh.layouts import column, layout, row
from bokeh.models import Div, Select
from distributed import Scheduler

from dask_isgd.dashboard import page_text
from dask_isgd.dashboard.colours import follow_colours
from dask_isgd.dashboard.panel import Panel
from dask_isgd.dashboard.panels import PANELS
from dask_isgd.dashboard.run_record import RunRecord
from dask_isgd.dashboard.run_watcher import RunWatcher, watch
from dask_isgd.runtime.dask_internals import page_template

INTERVAL = 1000
"""Milliseconds between two updates of a page."""
LATEST = "the latest run"
_ROWS = (
    ("loss", "error", "spread", "gain"),
    ("sampling", "speed", "versions", "weights"),
)
_LEAST_HEIGHT = 190
"""Pixels of a row of panels; the rows fill a window that is higher than three of them."""
_LOG_WIDTH = 300
_FONT = {"font-family": "Helvetica, Arial, sans-serif"}


class Page:
    """A choice of run above some panels; follows the latest run unless one is chosen."""

    def __init__(
        self,
        watcher: RunWatcher,
        panels: dict[str, Panel],
        chosen: str = LATEST,
        header: Callable[[RunRecord | None, float], str] = page_text.header,
    ) -> None:
        self.watcher, self.panels, self._header = watcher, panels, header
        self.select = Select(value=chosen, options=[LATEST], width=330, height=32, name="run")
        self.header = Div(text="", sizing_mode="stretch_width", styles=_FONT, name="header")
        self.event_log = Div(
            text="", sizing_mode="stretch_both", styles={**_FONT, "overflow-y": "auto"}, name="event-log"
        )
        self._shown: tuple[RunRecord | None, int] = (None, -1)
        self.select.on_change("value", lambda attr, old, new: self.update())
        self.update()

    def record(self) -> RunRecord | None:
        """Return the record of the run that is shown."""
        records = self.watcher.latest_first()
        return self.watcher.runs.get(self.select.value, records[0] if records else None)

    @without_property_validation  # type: ignore[untyped-decorator]
    def update(self) -> None:
        """Bring the page up to date; this costs next to nothing if nothing has changed."""
        now = time.time()
        record = self.record()
        options = [LATEST, *((each.run, page_text.label(each, now)) for each in self.watcher.latest_first())]
        if options != self.select.options:
            self.select.options = options
        self.header.text = self._header(record, now)
        shown = (record, record.changes if record is not None else 0)
        if shown == self._shown:
            return
        self._shown = shown
        self.event_log.text = page_text.event_log(record)
        if record is not None:
            for panel in self.panels.values():
                panel.update(record)


def overview(scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """Build the page with everything about one run, for a pane of its own."""
    follow_colours(doc, _overview(scheduler, doc).panels.values())


def framed(scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """Build the same page with the navigation of Dask's own pages, and as light as they are."""
    _overview(scheduler, doc)
    doc.template = page_template()
    doc.template_variables.update(extra)


def _overview(scheduler: Scheduler, doc: Any) -> Page:
    page = Page(watch(scheduler), {name: make() for name, make in PANELS.items()}, _chosen(doc))
    grid = [[page.panels[name].root for name in names] for names in _ROWS]
    lowest = row(
        column(page.panels["ages"].root, sizing_mode="stretch_both"),
        column(page.panels["age-histogram"].root, sizing_mode="stretch_both"),
        column(page.event_log, sizing_mode="stretch_height", width=_LOG_WIDTH),
        sizing_mode="stretch_both",
        min_height=_LEAST_HEIGHT,
    )
    rows = [row(*panels, sizing_mode="stretch_both", min_height=_LEAST_HEIGHT) for panels in grid]
    top = row(page.select, page.header, sizing_mode="stretch_width")
    _serve(doc, page, layout([top, *rows, lowest], sizing_mode="stretch_both"), "Dask: importance-sampled SGD")
    return page


def individual(name: str, scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """Build a page that one panel fills, for JupyterLab's panes."""
    panel = PANELS[name]()
    page = Page(watch(scheduler), {name: panel}, _chosen(doc), header=page_text.line)
    top = row(page.select, page.header, sizing_mode="stretch_width")
    _serve(doc, page, column(top, panel.root, sizing_mode="stretch_both"), f"Dask: {panel.title}")
    follow_colours(doc, [panel])


def faults(scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    """Build the page with the log of a run's faults and restarts."""
    page = Page(watch(scheduler), {}, _chosen(doc))
    root = column(page.select, page.header, page.event_log, sizing_mode="stretch_both")
    _serve(doc, page, root, "Dask: faults and restarts")
    follow_colours(doc, [])


def _chosen(doc: Any) -> str:
    """Return the id of the run that the page's address asks for, ``?run=ID``."""
    context = doc.session_context
    values = context.request.arguments.get("run") if context is not None and context.request is not None else None
    return values[0].decode(errors="replace") if values else LATEST


def _serve(doc: Any, page: Page, root: Any, title: str) -> None:
    doc.title = title
    doc.add_root(root)
    doc.add_periodic_callback(page.update, INTERVAL)


PAGES: dict[str, Callable[[Scheduler, dict[str, Any], Any], None]] = {
    "/isgd": framed,
    "/individual-isgd-overview": overview,
    **{f"/individual-isgd-{name}": partial(individual, name) for name in PANELS},
    "/individual-isgd-faults": faults,
}
"""Path to document, in the form that Dask's dashboard expects."""
