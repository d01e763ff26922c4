"""A plugin of the scheduler that keeps a run's two long tasks alive as long as the run makes progress.

Dask restarts a task whose worker has died, three times in the life of the task, and then blames the
task for these deaths. A run of weeks loses more workers than that through no fault of its own. So the
plugin resets Dask's count whenever the run has made progress since the last death; without progress
from one death to the next, Dask's verdict stands. No task is ever submitted twice and the tasks keep
their owner, so a run ends with its client unless it is detached.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from distributed import Client

from dask_isgd.runtime import dask_internals

logger = logging.getLogger(__name__)

_REMEMBER_SECONDS = 3600.0
"""For how long the scheduler keeps the events of a run whose tasks it has forgotten."""


def guard_run(client: Client, run: str, topic: str, attempt: int, tasks: Mapping[str, Any]) -> None:
    """Register a plugin that guards the ``tasks`` of a run: their keys, by role.

    It announces restarts, a lack of workers and failures of the tasks on the run's topic, protects the
    learners' workers when the cluster is scaled down, and is removed together with the tasks.
    """
    try:
        client.register_plugin(_guard_plugin(run, topic, attempt, dict(tasks)))
    except Exception as error:  # such as a scheduler that accepts no plugins (distributed.scheduler.pickle)
        logger.warning("run %s: the scheduler does not accept a plugin (%s); Dask gives up on the run's tasks after "
                       "distributed.scheduler.allowed-failures deaths of their workers", run, error)  # fmt: skip


def _guard_plugin(run: str, topic: str, attempt: int, tasks: dict[str, Any]) -> Any:
    """Return the plugin. Its class is defined here so that it is sent by value: the scheduler may lack this package."""
    from distributed import SchedulerPlugin

    internals, remember_seconds = dask_internals.task_edits(), _REMEMBER_SECONDS

    class RunGuardPlugin(SchedulerPlugin):
        name = f"isgd-{run}-{attempt}"
        idempotent = True

        def __init__(self) -> None:
            self.roles = {key: role for role, key in tasks.items()}
            self.addresses: dict[Any, str] = {}
            """Address of the worker each task was last assigned to."""
            self.followers: dict[Any, str] = {}
            """Addresses of the learner's other ranks, if it has any."""
            self.unassigned: set[Any] = set()
            self.progressed: set[Any] = set()
            """Tasks since whose last assignment the run has made progress."""
            self.number = 0
            self.scheduler: Any = None

        async def start(self, scheduler: Any) -> None:
            self.scheduler = scheduler

        def log_event(self, name: str, message: Any) -> None:
            if not isinstance(message, dict):
                return
            if name == topic and message.get("kind") in ("progress", "scored"):
                self.progressed.update(self.roles)
                for task in filter(None, map(self.scheduler.tasks.get, self.roles)):
                    internals.forget_submissions(self.scheduler, task)
            elif name == "worker-restart-memory":  # logged by a nanny before it kills its worker
                self.on_killed_for_memory(str(message.get("worker")), int(message.get("rss", 0)))

        def transition(self, key: Any, start: str, finish: str, *_: Any, **more: Any) -> None:
            task = self.scheduler.tasks.get(key)
            if finish == "no-worker" and task is not None and self.of_run(key):
                internals.accept_any_worker(task)
            role = self.roles.get(key)
            if role is None:
                if self.of_run(key) and str(key[0]).startswith("follow-"):
                    self.on_follower(key, task if finish == "processing" else None)
                return
            if finish == "processing" and task is not None and task.processing_on is not None:
                self.on_assigned(key, role, task)
            elif finish == "no-worker":
                self.unassigned.add(key)
                self.announce_fault(f"{role} waits", "no worker can take it")
            elif finish == "erred" and task is not None and internals.given_up(self.scheduler, task):
                self.announce_failure(role, f"its worker died {task.suspicious} times, without progress in between")
            elif finish == "erred" and start == "no-worker":
                self.announce_failure(role, "no worker could take it within distributed.scheduler.no-workers-timeout")
            elif finish == "erred":  # the task announces this itself, unless it failed before it could
                self.announce_failure(role, str(more.get("exception_text") or "see the log of its worker")[:400])
            elif finish == "forgotten":
                del self.roles[key]
                if not self.roles:
                    self.scheduler.remove_plugin(self.name)
                    self.scheduler.loop.call_later(remember_seconds, self.forget_events)

        def forget_events(self) -> None:
            if not any(name.startswith(f"isgd-{run}-") for name in self.scheduler.plugins):  # not resumed meanwhile
                internals.forget_topic(self.scheduler, topic)

        def of_run(self, key: Any) -> bool:
            return isinstance(key, tuple) and str(key[0]).endswith(f"-{run}")

        def on_assigned(self, key: Any, role: str, task: Any) -> None:
            if key in self.addresses or key in self.unassigned:
                self.announce_fault(f"{role} starts again", f"on {task.processing_on.address}")
            if key in self.progressed:
                internals.reset_deaths(task)
            self.progressed.discard(key)
            self.addresses[key] = task.processing_on.address
            self.unassigned.discard(key)

        def on_follower(self, key: Any, task: Any) -> None:
            self.followers.pop(key, None)
            if task is not None and task.processing_on is not None:
                self.followers[key] = task.processing_on.address

        def on_killed_for_memory(self, address: str, rss: int) -> None:
            worker = self.scheduler.workers.get(address)
            limit = f" of {worker.memory_limit / 1e6:,.0f} MB" if worker is not None and worker.memory_limit else ""
            for role in [role for key, role in self.roles.items() if self.addresses.get(key) == address]:
                self.announce_fault(
                    f"{role} killed for memory", f"its worker {address} held {rss / 1e6:,.0f} MB{limit}"
                )

        def announce_failure(self, role: str, message: str) -> None:
            self.announce(kind="ended", attempt=attempt, role=role, outcome="failed", step=0, message=message)

        def announce_fault(self, what: str, detail: str) -> None:
            self.announce(kind="fault", what=what, detail=detail)

        def announce(self, **record: Any) -> None:
            self.number += 1
            message = {"run": run, "incarnation": 0, "sender": self.name, "number": self.number, **record}
            # later, once a dead worker's client has been removed: writing to it logs an error
            self.scheduler.loop.call_later(0.2, self.scheduler.log_event, topic, message)

        def valid_workers_downscaling(self, scheduler: Any, workers: Any) -> Any:
            kept = {address for key, address in self.addresses.items() if self.roles.get(key) == "learner"}
            kept.update(self.followers.values())
            return [worker for worker in workers if worker.address not in kept]

    return RunGuardPlugin()
