"""The private parts of Dask that have no public equivalent, each with its reason.

A canary test (``tests/test_dask_internals.py``) fails when a release of distributed moves one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal

from dask.typing import Key
from distributed import Scheduler, Worker
from distributed.core import Status

TaskStatus = Literal["wanted", "cancelled", "leaving"]


def task_status(worker: Worker, key: Key) -> TaskStatus:
    """What the cluster thinks of the task that runs under ``key`` on ``worker``.

    ``"wanted"``: go on. ``"cancelled"``: nobody wants its result any more. ``"leaving"``: the worker
    closes or retires, or has lost its scheduler; the task starts anew elsewhere.

    Nothing interrupts the thread of a Dask task: after a cancel, the death of its client, a
    retirement or the end of the worker's lifetime it runs on. The state of the worker and of the
    task flips within 0.02 s, and no public API tells a task so. Read without the event loop's
    lock: two attribute look-ups and a dict look-up, each atomic. A worker that is paused, having
    used most of its memory, takes no new tasks and goes on with those it has.
    """
    if worker.status not in (Status.running, Status.paused):
        return "leaving"
    task = worker.state.tasks.get(key)
    return "wanted" if task is not None and task.state in ("executing", "long-running") else "cancelled"


def task_edits() -> SimpleNamespace:
    """Return functions that judge and change a task in the scheduler's process, for a plugin.

    They are defined here so that they are sent by value: the scheduler may lack this package.
    """

    def given_up(scheduler: Any, task: Any) -> bool:
        """Whether Dask has failed the task because too many of its workers died."""
        return bool(task.suspicious > scheduler.allowed_failures)

    def reset_deaths(task: Any) -> None:
        """Set the number of workers that died with the task to 0; Dask itself never does."""
        task.suspicious = 0

    def accept_any_worker(task: Any) -> None:
        """Let any worker that joins take a task that only prefers some and has none.

        Dask wakes such a task for the workers it names and no others. Restarted under new addresses,
        they never come back, and the task would wait for ever (seen in 2026.8.0).
        """
        if task.loose_restrictions:
            task.worker_restrictions = set()

    return SimpleNamespace(given_up=given_up, reset_deaths=reset_deaths, accept_any_worker=accept_any_worker)


def close_key_files(cluster: Any) -> None:
    """Close, and so delete, the files in which a ``JobQueueCluster`` shares a temporary key with its jobs.

    dask-jobqueue leaves them, open and readable on the shared file system, to the garbage collector.
    """
    for name in ("_job_ca_file", "_job_cert", "_job_key"):
        with contextlib.suppress(AttributeError, OSError):  # no temporary keys; the folder is gone
            getattr(cluster, name).close()


# The dashboard. Dask has no public way to add a page to it: other projects (dask-cuda's NVLink page,
# for one) write to the same table. The imports wait until they are needed: they bring in Bokeh.


def list_pages(pages: Mapping[str, Any]) -> None:
    """Add documents, by path, to the table from which every later scheduler builds its dashboard.

    Paths with ``individual`` in them are listed under "More…" and in ``individual-plots.json``.
    Raises ImportError without Bokeh.
    """
    from distributed.dashboard.scheduler import applications

    applications.update(pages)


def serves_page(scheduler: Scheduler, path: str) -> bool | None:
    """Whether a running scheduler's dashboard has a page; None where there is no dashboard."""
    found = [app for app in scheduler.http_application.applications if hasattr(app, "app_paths")]
    return any(path in app.app_paths for app in found) if found else None


def serve_pages(scheduler: Scheduler, pages: Mapping[str, Any]) -> None:
    """Add documents to the dashboard of a scheduler that runs; "More…" cannot know of them."""
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    first = next(app for app in scheduler.http_application.applications if hasattr(app, "app_paths"))
    application = BokehApplication(
        dict(pages), scheduler, prefix=first.prefix, template_variables=template_variables(scheduler)
    )
    scheduler.http_application.add_application(application)
    application.initialize(IOLoop.current())
    application.start()


def name_page(scheduler: Scheduler, page: str) -> None:
    """Put a page into the navigation bar of a scheduler's dashboard; the templates read this very list."""
    from distributed.dashboard.scheduler import template_variables

    pages = template_variables(scheduler)["pages"]
    if page not in pages:
        pages.insert(pages.index("info") if "info" in pages else len(pages), page)


def page_template() -> Any:
    """The template of Dask's own pages, with their navigation bar."""
    from distributed.dashboard.components.scheduler import env

    return env.get_template("simple.html")
