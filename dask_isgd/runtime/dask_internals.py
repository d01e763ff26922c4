"""The private parts of Dask that have no public equivalent, each with its reason.

A canary test (``tests/runtime/test_dask_internals.py``) fails when a release of Dask moves one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from functools import wraps
from types import SimpleNamespace
from typing import Any, Literal, ParamSpec, TypeVar

import dask.config
from dask.typing import Key
from dask.utils import key_split
from distributed import Scheduler, SpecCluster, Status, Worker, get_worker
from distributed.core import Server
from distributed.metrics import context_meter
from distributed.scheduler import NoValidWorkerError as NoValidWorkerError  # what ends a task without a worker
from distributed.utils import NoOpAwaitable

_P = ParamSpec("_P")
_T = TypeVar("_T")
_DIAGNOSTICS = {"profile": 250.0, "profile-cycle": 10_000.0, "tick": 500.0, "monitor": 1000.0}
"""Milliseconds between two looks of the profiler, two of its records, two looks of the clock that finds a blocked event
loop, and two at the system."""
_PROFILE_RECORDS = 12
_MOST_KEYS = 10_000

# Tasks ------------------------------------------------------------------------------------------

TaskStatus = Literal["wanted", "cancelled", "leaving"]


def task_status(worker: Worker, key: Key) -> TaskStatus:
    """Return what the cluster wants of the task that runs under ``key`` on ``worker``.

    ``"wanted"``: continue. ``"cancelled"``: its result is no longer wanted. ``"leaving"``: the worker
    closes or retires, or has lost its scheduler; the task is restarted elsewhere.

    Nothing interrupts the thread of a Dask task: after a cancel, the death of its client, a
    retirement or the end of the worker's lifetime it keeps running. The state of the worker and of the
    task changes within 0.02 s, and no public API reports this to a task. Read without the event loop's
    lock: two attribute look-ups and a dict look-up, each atomic. A worker that is paused, because it
    has used most of its memory, accepts no new tasks and continues with those it has.
    """
    if worker.status not in (Status.running, Status.paused):
        return "leaving"
    task = worker.state.tasks.get(key)
    return "wanted" if task is not None and task.state in ("executing", "long-running") else "cancelled"


def unmetered(task: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a function that runs as a task for weeks: Dask keeps no fine metrics of it.

    Dask adds each one to lists that it reads when the task ends: 160 a second in the coordinator, none of which is ever
    freed. What the task starts, such as the client of its worker, inherits this.
    """

    @wraps(task)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with context_meter.clear_callbacks():
            return task(*args, **kwargs)

    return inner


def forget_keys() -> None:
    """Empty Dask's cache of the prefixes of keys once it holds 10,000 keys.

    Dask lets it grow to 100,000 keys, 45 MB in each process that sees as many tasks, and its size is no setting. To
    make a prefix again costs little.
    """
    if key_split.cache_info().currsize > _MOST_KEYS:
        key_split.cache_clear()


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
        they never come back, and the task would wait indefinitely (seen in 2026.8.0).
        """
        if task.loose_restrictions:
            task.worker_restrictions = set()

    def forget_topic(scheduler: Any, topic: str) -> None:
        """Drop the events of a topic; Dask itself keeps those of every topic as long as the scheduler lives."""
        found = scheduler._broker._topics.get(topic)
        if found is not None and not found.subscribers:
            del scheduler._broker._topics[topic]
        elif found is not None:
            found.truncate()

    most_keys = _MOST_KEYS

    def forget_submissions(scheduler: Any, task: Any) -> None:
        """Drop what Dask notes of each submission in the span of a task, but for the latest hundred, and keys.

        A span lasts as long as one of its tasks, and a run submits tasks for weeks. What these tasks depend on, as the
        parameters, has a span of its own, in which the same is noted.
        """
        if key_split.cache_info().currsize > most_keys:
            key_split.cache_clear()
        if (extension := scheduler.extensions.get("spans")) is None:
            return
        spans = extension.spans
        groups = set(spans[task.group.span_id].groups) if task.group.span_id in spans else set()
        groups |= {needed for group in groups for needed in group.dependencies}
        for name in {group.span_id for group in groups} & spans.keys():
            del (spans[name]._metadata or {"collections": []})["collections"][:-100]

    return SimpleNamespace(
        given_up=given_up,
        reset_deaths=reset_deaths,
        accept_any_worker=accept_any_worker,
        forget_topic=forget_topic,
        forget_submissions=forget_submissions,
    )


# Clusters ---------------------------------------------------------------------------------------


class SpecClusterHooks(SpecCluster):
    """A ``SpecCluster`` with two methods to override, which are called from private ones.

    ``SpecCluster`` has no public notification of workers that come and go, and its own reaction gives
    up a worker after ``distributed.deploy.lost-worker-timeout`` even while its nanny restarts it. There
    are several public ways to close it, some of which return early; all of them end in ``_close``.
    """

    def on_workers_changed(self, removed: bool) -> None:
        """Called on the event loop after ``scheduler_info`` has lost a worker (``removed``) or gained some."""

    def on_closed(self) -> None:
        """Called on the event loop once the cluster has closed, or has failed to."""

    def _update_worker_status(self, op: str, msg: Any) -> None:
        super(SpecCluster, self)._update_worker_status(op, msg)  # type: ignore[no-untyped-call]
        self.on_workers_changed(op == "remove")

    async def _close(self) -> None:
        try:
            await super()._close()  # type: ignore[no-untyped-call]
        finally:
            self.on_closed()


async def start_missing(cluster: SpecCluster) -> None:
    """Start and stop workers until they match ``worker_spec``; publicly only ``scale`` does so, and it counts all."""
    await cluster._correct_state()


def start_missing_soon(cluster: SpecCluster) -> Any:
    """Schedule ``start_missing`` from any thread; return what ``SpecCluster.scale`` returns."""
    assert cluster.loop is not None
    cluster.loop.add_callback(cluster._correct_state)
    return NoOpAwaitable() if cluster.asynchronous else None


def keep_until_done(cluster: SpecCluster, task: asyncio.Task[Any]) -> None:
    """Hold a reference to a task of the event loop, as the cluster does for its own: asyncio holds none."""
    cluster._futures.add(task)
    task.add_done_callback(cluster._futures.discard)


def memory_per_worker(cluster: SpecCluster) -> int:
    """Return the bytes of memory of a worker to be added; ``scale(memory=…)`` needs it and is overridden."""
    return cluster._memory_per_worker()


def threads_per_worker(cluster: SpecCluster) -> int:
    """Return the threads of a worker to be added; ``scale(cores=…)`` needs it and is overridden."""
    return cluster._threads_per_worker()


def nanny_restarts(worker: Any) -> bool:
    """Whether a nanny is restarting its worker, which no event reports; a job of a queue has no nanny here."""
    process = getattr(worker, "process", None)
    return worker.status is Status.running and getattr(process, "status", None) in (Status.stopped, Status.starting)


def job_options(cluster: Any) -> dict[str, Any]:
    """Return the very dict of options from which a ``JobQueueCluster`` makes a job; changes apply to later jobs."""
    options: dict[str, Any] = cluster._job_kwargs
    return options


def threads_per_process(cluster: Any) -> int:
    """Return the threads of each worker of a ``JobQueueCluster``'s job: dask-jobqueue divides them in the job alone."""
    return int(cluster._dummy_job.worker_process_threads)


def calm(server: Server) -> None:
    """Let the event loop of a scheduler, nanny or worker wake seldom: for diagnostics a few times per second.

    Otherwise a worker's profiler wakes it a hundred times per second and the loop's own clock fifty times. In a
    learner's process each time takes the interpreter's lock, 2 to 3 % of a training loop of small steps; on a machine
    whose every core has a torch thread, each also takes a core from one thread while the others wait for it. The
    intervals are read from the configuration only when a server starts. All pages of the dashboard remain.

    A worker remembers two minutes of its profile. Otherwise it would keep a thousand records of one second, trees of
    stacks that grow to more than 100 MB in the first 17 minutes.
    """
    for name, interval in _DIAGNOSTICS.items():
        callback = server.periodic_callbacks.get(name)
        if callback is not None:
            callback.callback_time = max(callback.callback_time, interval)
    for name in ("profile_history", "profile_keys_history"):
        if hasattr(server, name):
            setattr(server, name, deque(getattr(server, name), maxlen=_PROFILE_RECORDS))


def memory_limit() -> int | None:
    """Return the bytes of memory that the worker of the calling task may use; None: no limit, or no worker.

    ``Worker.memory_limit`` is deprecated in favour of the memory manager, which is not documented.
    """
    try:
        limit: int | None = get_worker().memory_manager.memory_limit
    except ValueError:  # not in a task
        return None
    return limit


def worker_supply(worker: Worker) -> tuple[int, Mapping[str, float]]:
    """Return the threads and the resources of a worker, to which its tasks have no public access."""
    return worker.state.nthreads, worker.state.total_resources


def close_key_files(cluster: Any) -> None:
    """Close, and so delete, the files in which a ``JobQueueCluster`` shares a temporary key with its jobs.

    dask-jobqueue leaves them, open and readable on the shared file system, to the garbage collector.
    """
    for name in ("_job_ca_file", "_job_cert", "_job_key"):
        with contextlib.suppress(AttributeError, OSError):  # no temporary keys; the folder is gone
            getattr(cluster, name).close()


def export_config(settings: Mapping[str, Any]) -> str:
    """Return a line of shell script that passes settings of Dask to the processes started after it.

    A variable per setting (``DASK_…``) takes no nested value and none with a dash; Dask's own nannies
    pass settings this way.
    """
    return f"export DASK_INTERNAL_INHERIT_CONFIG={dask.config.serialize(dict(settings))}"


# The dashboard ----------------------------------------------------------------------------------
#
# Dask has no public way to add a page to its dashboard: other projects (for one, dask-cuda's NVLink
# page) write to the same table. The imports wait until they are needed because they load Bokeh.


def list_pages(pages: Mapping[str, Any]) -> None:
    """Add documents, by path, to the table from which every later scheduler builds its dashboard.

    Paths with ``individual`` in them are listed under "More…" and in ``individual-plots.json``.
    Raises ImportError without Bokeh.
    """
    from distributed.dashboard.scheduler import applications

    applications.update(pages)


def serves_page(scheduler: Scheduler, path: str) -> bool | None:
    """Whether a running scheduler's dashboard has a page; None if there is no dashboard."""
    found = [app for app in scheduler.http_application.applications if hasattr(app, "app_paths")]
    return any(path in app.app_paths for app in found) if found else None


def serve_pages(scheduler: Scheduler, pages: Mapping[str, Any]) -> None:
    """Add documents to the dashboard of a running scheduler; "More…" cannot list them."""
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
    """Return the template of Dask's own pages, with their navigation bar."""
    from distributed.dashboard.components.scheduler import env

    return env.get_template("simple.html")
