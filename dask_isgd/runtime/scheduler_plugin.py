"""What the scheduler does for a run: it never gives up on its two long tasks while they get on.

Dask starts a task again when its worker dies, three times in the life of the task, and then calls
it a killer of workers. A run of weeks loses more workers than that, through no fault of its own.
So a plugin of the scheduler forgets those deaths as long as the run advances in between; without
any progress from one death to the next, Dask's verdict stands. Nothing is ever submitted twice
and the tasks keep their owner, so a run ends with its client unless it is detached.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from distributed import Client

logger = logging.getLogger(__name__)


def keep(client: Client, run: str, topic: str, attempt: int, tasks: Mapping[str, Any]) -> None:
    """Have the scheduler look after the ``tasks`` of a run: their keys, by role.

    A restart, the lack of a worker and the end of a task are said on the run's topic, and the
    learner's worker is left out when the cluster is scaled down. Goes away with the tasks.
    """
    try:
        client.register_plugin(_guard_plugin(run, topic, attempt, dict(tasks)))
    except Exception as error:  # such as a scheduler that takes no plugins (distributed.scheduler.pickle)
        logger.warning("run %s: the scheduler takes no plugin (%s); Dask gives up on the run's tasks "
                       "after distributed.scheduler.allowed-failures deaths of their workers", run, error)  # fmt: skip


def _guard_plugin(run: str, topic: str, attempt: int, tasks: dict[str, Any]) -> Any:
    """The plugin, of a class made here: it travels by value, for the scheduler may lack this package."""
    from distributed.diagnostics.plugin import SchedulerPlugin

    class RunGuardPlugin(SchedulerPlugin):
        name = f"isgd-{run}-{attempt}"
        idempotent = True

        def __init__(self) -> None:
            self.roles = {key: role for role, key in tasks.items()}
            self.where: dict[Any, str] = {}
            self.lacking: set[Any] = set()
            self.advanced: set[Any] = set()
            self.number = 0
            self.scheduler: Any = None

        async def start(self, scheduler: Any) -> None:
            self.scheduler = scheduler

        def log_event(self, name: str, message: Any) -> None:
            if not isinstance(message, dict):
                return
            if name == topic and message.get("kind") in ("progress", "scored"):
                self.advanced.update(self.roles)
            elif name == "worker-restart-memory":  # said by a nanny before it ends its worker
                self.worn_out(str(message.get("worker")), int(message.get("rss", 0)))

        def transition(self, key: Any, start: str, finish: str, *_: Any, **more: Any) -> None:
            if finish == "no-worker":
                self.unbind(key)
            role = self.roles.get(key)
            if role is None:
                return
            task = self.scheduler.tasks.get(key)
            if finish == "processing" and task is not None and task.processing_on is not None:
                self.placed(key, role, task)
            elif finish == "no-worker":
                self.lacking.add(key)
                self.fault(f"{role} waits", "no worker can take it")
            elif finish == "erred" and task is not None and task.suspicious > self.scheduler.allowed_failures:
                self.failed(role, f"its worker died {task.suspicious} times, without progress in between")
            elif finish == "erred" and start == "no-worker":
                self.failed(role, "no worker could take it within distributed.scheduler.no-workers-timeout")
            elif finish == "erred":  # it says so itself, unless it failed before it could
                self.failed(role, str(more.get("exception_text") or "see the log of its worker")[:400])
            elif finish == "forgotten":
                del self.roles[key]
                if not self.roles:
                    self.scheduler.remove_plugin(self.name)

        def unbind(self, key: Any) -> None:
            """Let any worker that comes take a task of this run that only preferred some.

            Dask wakes such a task for the workers it names and no other: restarted under new
            addresses, they never come back, and it would wait for ever (seen in 2026.8.0).
            """
            task = self.scheduler.tasks.get(key)
            ours = isinstance(key, tuple) and str(key[0]).endswith(f"-{run}")
            if ours and task is not None and task.loose_restrictions:
                task.worker_restrictions = set()

        def placed(self, key: Any, role: str, task: Any) -> None:
            if key in self.where or key in self.lacking:
                self.fault(f"{role} starts again", f"on {task.processing_on.address}")
            if key in self.advanced:
                task.suspicious = 0
            self.advanced.discard(key)
            self.where[key] = task.processing_on.address
            self.lacking.discard(key)

        def worn_out(self, address: str, rss: int) -> None:
            worker = self.scheduler.workers.get(address)
            limit = f" of {worker.memory_limit / 1e6:,.0f} MB" if worker is not None and worker.memory_limit else ""
            for role in [role for key, role in self.roles.items() if self.where.get(key) == address]:
                self.fault(f"{role} killed for memory", f"its worker {address} held {rss / 1e6:,.0f} MB{limit}")

        def failed(self, role: str, message: str) -> None:
            self.say(kind="ended", attempt=attempt, role=role, outcome="failed", step=0, message=message)

        def fault(self, what: str, detail: str) -> None:
            self.say(kind="fault", what=what, detail=detail)

        def say(self, **record: Any) -> None:
            self.number += 1
            message = {"run": run, "incarnation": 0, "sender": self.name, "number": self.number, **record}
            # not before the client of a dead worker is struck off: writing to it is an error in the log
            self.scheduler.loop.call_later(0.2, self.scheduler.log_event, topic, message)

        def valid_workers_downscaling(self, scheduler: Any, workers: Any) -> Any:
            kept = {address for key, address in self.where.items() if self.roles.get(key) == "learner"}
            return [worker for worker in workers if worker.address not in kept]

    return RunGuardPlugin()
