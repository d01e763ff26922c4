"""The life cycle that the long Dask tasks of a run share: open, work, announce the end, close."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Protocol, TypeVar

from dask.typing import Key
from distributed import Client, Reschedule, Worker

from dask_isgd.errors import IsgdError, LeaseLostError
from dask_isgd.runtime.announcer import Announcer
from dask_isgd.runtime.dask_internals import TaskStatus, task_status
from dask_isgd.runtime.task_errors import log_in_one_line
from dask_isgd.storage.run.leases import Lease

logger = logging.getLogger(__name__)


class Closable(Protocol):
    def close(self) -> None: ...


class Part(Closable, Protocol):
    def open(self) -> object: ...


AnyClosable = TypeVar("AnyClosable", bound=Closable)
AnyPart = TypeVar("AnyPart", bound=Part)


class Parts(ExitStack):
    """The open parts of a task, closed in reverse order; an error of one is logged, and the others are closed.

    It is not logged if it is the error with which the task ends already, such as that of a full disk.
    """

    ends_with: BaseException | None = None

    def open(self, part: AnyPart) -> AnyPart:
        """Open a part, whose ``open`` leaves nothing open if it fails, and close it later."""
        part.open()
        return self.add(part)

    def add(self, part: AnyClosable) -> AnyClosable:
        """Close a part later that is open already."""
        self.callback(self._close_part, part)
        return part

    def _close_part(self, part: Closable) -> None:
        try:
            part.close()
        except IsgdError as error:
            if str(error) != str(self.ends_with):
                logger.error("%s could not be closed: %s", type(part).__name__, error)
        except Exception:
            logger.exception("%s could not be closed", type(part).__name__)


def rescheduled(outcome: str) -> str:
    """Return the outcome of a task; raise ``distributed.Reschedule`` if the task left with its worker."""
    if outcome == "left":
        raise Reschedule
    return outcome


class LongTask(ABC):
    """One incarnation of a long task, which runs under ``key`` on ``worker``."""

    announcer: Announcer
    lease: Lease
    """Both are set by ``open``."""

    def __init__(self, worker: Worker, client: Client, key: Key) -> None:
        self.worker, self.client, self.key = worker, client, key

    @property
    def status(self) -> TaskStatus:
        """Whether the cluster still wants this task."""
        return task_status(self.worker, self.key)

    def run_or_reschedule(self) -> str:
        """Return the outcome of ``run``; raise ``distributed.Reschedule`` if the task left with its worker.

        A worker that retires still reports results, until its data have been moved. A result would end the run.
        """
        return rescheduled(self.run())

    def run(self) -> str:
        """Open the parts, work to the end, announce how it ended and close the parts. Return the outcome.

        A task whose run has been started again meanwhile takes nothing from its successor, and ends at once.
        """
        log_in_one_line()
        if self.is_superseded():
            return "superseded"
        with Parts() as parts:
            try:
                self.open(parts)
                return self._run()
            except BaseException as error:
                parts.ends_with = error
                raise

    def _run(self) -> str:
        outcome, message = "failed", ""
        try:
            outcome = self._work_or_leave()
        except LeaseLostError as error:
            outcome, message = "fenced", str(error)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            try:
                self.finish(outcome)
            finally:
                self.announcer.ended(outcome, self.last_step, message)
        return outcome

    def _work_or_leave(self) -> str:
        with self.lease.explaining():
            try:
                return self.work()
            except (OSError, TimeoutError, RuntimeError):
                # Whatever breaks while the cluster goes away is part of its going away.
                if self.status == "wanted":
                    raise
                return self.leave()

    def is_superseded(self) -> bool:
        """Return whether the run has been started again since this task was submitted."""
        return False

    @abstractmethod
    def open(self, parts: Parts) -> None:
        """Open what the task needs, and set ``announcer``."""

    @abstractmethod
    def work(self) -> str:
        """Work until the task is over, and return its outcome (``events.Ended``)."""

    @abstractmethod
    def leave(self) -> str:
        """Leave because the user or the cluster no longer wants the task, and return the outcome."""

    @property
    @abstractmethod
    def last_step(self) -> int:
        """The step to announce at the end."""

    def finish(self, outcome: str) -> None:  # noqa: B027
        """Do what must be done before the end is announced."""
