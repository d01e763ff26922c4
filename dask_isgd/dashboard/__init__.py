"""Runs on Dask's own dashboard: a page ``/isgd``, and one page per panel.

There are three ways to add it. The first two list the pages under "More…" and in JupyterLab's Dask pane::

    dask scheduler --preload dask_isgd.dashboard
    distributed.scheduler.http.routes: [..., dask_isgd.dashboard]     # in Dask's configuration
    isgd.attach_dashboard(client)                                     # to a running scheduler

``isgd.LocalCluster`` and ``dask isgd train`` do the first automatically. This package imports no torch;
without Bokeh there is no page and no error.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_isgd.dashboard.run_watcher import watch
from dask_isgd.display.render import render
from dask_isgd.errors import ClusterMismatchError
from dask_isgd.runtime import dask_internals

if TYPE_CHECKING:
    from distributed import Client, Scheduler

__all__ = ["Dashboard", "attach_dashboard", "dask_setup", "routes"]

PATH = "/isgd"
routes: list[Any] = []
"""Empty: being listed among the scheduler's HTTP modules is only what imports this module early enough."""


def _pages() -> dict[str, Any] | None:
    """Return the documents, or None without Bokeh or with a version of it that Dask does not accept."""
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
    """Add the pages to a scheduler that has started; ``--preload`` calls this."""
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
    """The address of the page and what is missing from it."""

    link: str
    listed: bool
    """Whether JupyterLab's Dask pane and "More…" list the pages."""
    note: str

    def __str__(self) -> str:
        return f"{self.link}\n{self.note}" if self.note else self.link

    def _repr_html_(self) -> str:
        return render("link", link=self.link, note=self.note)


def attach_dashboard(client: Client) -> Dashboard:
    """Add the pages to the dashboard of the cluster's running scheduler.

    Runs that have already begun show what the scheduler remembers of them, about the last 1,000 events.
    Pages that are added now are not listed under "More…" or in JupyterLab's pane; the result's note
    explains this. Raises ClusterMismatchError if the scheduler lacks this package, Bokeh or a dashboard.
    """
    try:
        state = client.run_on_scheduler(_attach)
    except ImportError as error:
        raise ClusterMismatchError(
            f"the scheduler's process cannot import dask_isgd.dashboard ({error}); install dask_isgd there"
        ) from error
    if state == "no bokeh":
        raise ClusterMismatchError("the scheduler's process has no Bokeh or too old a version; install bokeh there")
    if state == "no dashboard":
        raise ClusterMismatchError(
            "the scheduler has no dashboard; start it with one, `dask scheduler --dashboard-address 127.0.0.1:8787`"
        )
    base = str(client.dashboard_link).removesuffix("/status")
    listed = state == "listed"
    note = (
        "The pages are not listed under More… or in JupyterLab's Dask pane, because the scheduler was already "
        "running; to list them, start it with --preload dask_isgd.dashboard."
    )
    return Dashboard(base + PATH, listed, "" if listed else note)


def _attach(dask_scheduler: Scheduler) -> str:
    """Add the pages, on the scheduler; return "listed", "added", "no dashboard" or "no bokeh"."""
    served = dask_internals.serves_page(dask_scheduler, PATH)
    pages = _pages()
    if served is None:
        return "no dashboard"
    if pages is None:
        return "no bokeh"
    watcher = watch(dask_scheduler)
    if not served:
        dask_internals.serve_pages(dask_scheduler, pages)
        watcher.pages_added = True
    dask_setup(dask_scheduler)
    return "added" if watcher.pages_added else "listed"
