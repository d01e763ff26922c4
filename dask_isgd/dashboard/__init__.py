"""Runs on Dask's own dashboard: a page ``/isgd``, and one page for each picture.

Three ways to have it. The first two list the pages under "More…" and in JupyterLab's Dask pane::

    dask scheduler --preload dask_isgd.dashboard
    distributed.scheduler.http.routes: [..., dask_isgd.dashboard]     # in Dask's configuration
    isgd.attach_dashboard(client)                                     # on a scheduler that runs

``isgd.LocalCluster`` and ``dask isgd train`` do the first by themselves. Imports no torch; without
Bokeh there is no page and no error.
"""

from __future__ import annotations

import html
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_isgd.dashboard.watch import watch
from dask_isgd.errors import ClusterMismatchError
from dask_isgd.runtime import dask_internals

if TYPE_CHECKING:
    from distributed import Client, Scheduler

__all__ = ["Dashboard", "attach_dashboard", "dask_setup", "routes"]

PATH = "/isgd"
routes: list[Any] = []
"""None of our own: to be named among the scheduler's HTTP modules is what gets this module imported in time."""


def _pages() -> dict[str, Any] | None:
    """The documents, or None where there is no Bokeh to draw them, or not the one Dask wants."""
    if importlib.util.find_spec("bokeh") is None:
        return None
    try:
        from dask_isgd.dashboard.pages import PAGES

        dask_internals.list_pages(PAGES)
    except ImportError:
        return None
    return PAGES


_pages()


def dask_setup(scheduler: Scheduler) -> None:
    """What ``--preload`` calls once the scheduler has started."""
    watch(scheduler)
    _metrics()
    if dask_internals.serves_page(scheduler, PATH):
        dask_internals.name_page(scheduler, PATH.strip("/"))


def _metrics() -> None:
    if importlib.util.find_spec("prometheus_client") is not None:
        from dask_isgd.dashboard.metrics import register

        register()


@dataclass(frozen=True)
class Dashboard:
    """Where the page is, and what it cannot do."""

    link: str
    listed: bool
    """Whether JupyterLab's Dask pane and "More…" list the pages."""
    note: str

    def __str__(self) -> str:
        return f"{self.link}\n{self.note}" if self.note else self.link

    def _repr_html_(self) -> str:
        link = html.escape(self.link, quote=True)
        note = f"<div>{html.escape(self.note)}</div>" if self.note else ""
        return f'<a href="{link}" target="_blank">{link}</a>{note}'


def attach_dashboard(client: Client) -> Dashboard:
    """Add the pages to the dashboard of the cluster's scheduler, which runs already.

    Runs that have begun show what the scheduler remembers of them, the last 1,000 events or so. Pages
    that are added now are not listed under "More…" or in JupyterLab's pane; the result says so. Raises
    ClusterMismatchError where the scheduler lacks this package, Bokeh or a dashboard.
    """
    try:
        state = client.run_on_scheduler(_attach)
    except ImportError as error:
        raise ClusterMismatchError(
            f"the scheduler's process cannot import dask_isgd.dashboard ({error}); install dask_isgd there"
        ) from error
    if state == "no bokeh":
        raise ClusterMismatchError("the scheduler's process has no Bokeh, or too old a one; install bokeh there")
    if state == "no dashboard":
        raise ClusterMismatchError(
            "the scheduler has no dashboard; start it with one, `dask scheduler --dashboard-address 127.0.0.1:8787`"
        )
    base = str(client.dashboard_link).removesuffix("/status")
    listed = state == "listed"
    note = (
        "Not listed under More… or in JupyterLab's Dask pane, because the scheduler was running already; "
        "start it with --preload dask_isgd.dashboard for that."
    )
    return Dashboard(base + PATH, listed, "" if listed else note)


def _attach(dask_scheduler: Scheduler) -> str:
    """On the scheduler: "listed", "added", "no dashboard" or "no bokeh"."""
    served = dask_internals.serves_page(dask_scheduler, PATH)
    pages = _pages()
    if served is None:
        return "no dashboard"
    if pages is None:
        return "no bokeh"
    found = watch(dask_scheduler)
    if not served:
        dask_internals.serve_pages(dask_scheduler, pages)
        found.added = True
    dask_setup(dask_scheduler)
    return "added" if found.added else "listed"
